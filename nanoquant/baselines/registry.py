"""The baselines by name: what each is, whose code it is, and whether it needs text."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from torch import Tensor

from nanoquant.baselines import binary, integers
from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.target import Target, check_groups

Apply = Callable[[Target, BaselineConfig, Tensor | None], None]

CALIBRATION = ("text", "windows", "length")
GROUPS = ("group_size",)

NO_GPTQ = (
    "torchao 0.18 has GPTQ for 4 and 8 bits only and runs it on CUDA only, for 4 bits with the package mslk; "
    "nothing is put in its place: awq{bits} and hqq{bits} are other methods at these bits"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """One way to quantize the linears of a decoder in place."""

    what: str
    """One line for tables and help."""
    source: str
    """Whose code or formula it is."""
    apply: Apply | None = None
    """Changes the model of a target; none where no library offers it here."""
    reads: tuple[str, ...] = ()
    """Fields of BaselineConfig that it depends on."""
    ranks: Callable[[dict[str, tuple[int, int]], float], dict[str, int]] | None = None
    """Ranks of shapes (d_out, d_in) at some bits, for one that chooses them."""
    unavailable: str = ""
    """Why there is no ``apply``."""

    @property
    def needs_text(self) -> bool:
        """Whether it wants calibration text."""
        return "text" in self.reads

    @property
    def takes_bits(self) -> bool:
        """Whether a name may end in @BITS."""
        return "bits" in self.reads


def _integers(bits: int, hqq: bool) -> Baseline:
    what = f"{bits}-bit integers, " + (
        "HQQ's scales, no zero points" if hqq else "round to nearest, zero points"
    )
    source = "torchao IntxWeightOnlyConfig, packed"
    return Baseline(
        what=what, source=source, apply=integers.RoundToNearest(bits, hqq), reads=GROUPS
    )


BASELINES: dict[str, Baseline] = {
    "bf16": Baseline(what="dense, bfloat16", source="torch", apply=integers.keep_bfloat16),
    "int8": Baseline(
        what="8-bit integers, a scale a row",
        source="torchao Int8WeightOnlyConfig",
        apply=integers.int8,
    ),
    "int4": Baseline(
        what="4-bit integers, round to nearest, zero points",
        source="torchao int4 weight-only",
        apply=integers.int4,
        reads=GROUPS,
    ),
    **{f"int{bits}": _integers(bits, hqq=False) for bits in (3, 2, 1)},
    **{f"hqq{bits}": _integers(bits, hqq=True) for bits in (4, 3, 2, 1)},
    **{
        f"awq{bits}": Baseline(
            what=f"{bits}-bit integers, activation-aware scales",
            source="torchao AWQConfig" + ("" if bits == 4 else " over packed integers"),
            apply=integers.AWQ(bits),
            reads=(*CALIBRATION, *GROUPS),
        )
        for bits in (4, 3, 2)
    },
    **{
        f"gptq{bits}": Baseline(
            what=f"{bits}-bit integers, GPTQ",
            source="torchao GPTQConfig",
            unavailable=NO_GPTQ.format(bits=bits),
        )
        for bits in (4, 3, 2)
    },
    "rtn1": Baseline(
        what="signs, a scale a row",
        source="XNOR-Net's binary weights (arXiv 1603.05279)",
        apply=binary.rtn1,
    ),
    "xnor": Baseline(
        what="signs, a scale a row and a column",
        source="XNOR-Net's objective with both scales, as OneBit (arXiv 2402.11295)",
        apply=binary.xnor,
    ),
    "sign-svd": Baseline(
        what="signs of the truncated SVD, scales refitted",
        source="plain",
        apply=binary.sign_of_svd,
        ranks=binary.svd_ranks,
        reads=("bits",),
    ),
    "dual-svid": Baseline(
        what="LittleBit's initialization, one path",
        source="LittleBit (arXiv 2506.13771)",
        apply=binary.dual_svid_initialization,
        ranks=binary.ranks_with_middle,
        reads=("bits",),
    ),
    "nanoquant-init": Baseline(
        what="our ADMM initialization alone",
        source="NanoQuant (arXiv 2602.06694)",
        apply=binary.nanoquant_initialization,
        ranks=binary.plain_ranks,
        reads=(*CALIBRATION, "bits", "seed"),
    ),
}


def split_name(name: str) -> tuple[str, float | None]:
    """Split "sign-svd@0.8" into the name of a baseline and its bits, none where the name has none.

    Raises:
        ValueError: the name is unknown (with the nearest ones), takes no bits, or the bits are no number.
    """
    kind, at, bits = name.partition("@")
    if kind not in BASELINES:
        near = difflib.get_close_matches(kind, BASELINES, n=3, cutoff=0.4)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"there is no baseline {kind!r}{nearest}; baselines are {', '.join(BASELINES)}"
        )
    if not at:
        return kind, None
    if not BASELINES[kind].takes_bits:
        raise ValueError(f"{kind} has bits of its own; write {kind} instead of {name!r}")
    try:
        return kind, float(bits)
    except ValueError:
        raise ValueError(f"the bits after @ in {name!r} are no number; write {kind}@0.8") from None


def needs_text(name: str) -> bool:
    """Whether the baseline of a name wants calibration text."""
    return BASELINES[split_name(name)[0]].needs_text


def find_baseline(name: str, config: BaselineConfig) -> tuple[Baseline, BaselineConfig]:
    """The baseline of a name, and the settings with the bits of the name.

    Raises:
        ValueError: unknown name, a baseline that no library offers here, or text is needed and none is given.
    """
    kind, bits = split_name(name)
    baseline = BASELINES[kind]
    if baseline.apply is None:
        raise ValueError(f"{kind} is not available: {baseline.unavailable}")
    if baseline.needs_text and config.text is None:
        raise ValueError(
            f"{kind} needs calibration text, other than the text it is measured on: give --baseline.text FILE"
        )
    return baseline, config if bits is None else dataclasses.replace(config, bits=bits)


def check_shapes(name: str, shapes: dict[str, tuple[int, int]], config: BaselineConfig) -> None:
    """Refuse linears of shapes (d_out, d_in) that the settings of a baseline do not suit.

    Raises:
        ValueError: the group size does not divide all rows, or the bits suit no ranks; says what would.
    """
    baseline, config = find_baseline(name, config)
    if "group_size" in baseline.reads:
        check_groups(shapes, config.group_size)
    if baseline.ranks is not None:
        baseline.ranks(shapes, config.bits)


def apply_baseline(
    name: str, target: Target, config: BaselineConfig, windows: Tensor | None = None
) -> None:
    """Quantize the linears of a target in place.

    Args:
        name: of the registry, perhaps with @BITS.
        target: of a dense model.
        config: settings of all baselines.
        windows: token ids (N, T) of the calibration text, for a baseline that needs it.

    Raises:
        ValueError: as :func:`find_baseline`, or the shapes do not allow it.
    """
    check_shapes(name, target.shapes, config)
    baseline, config = find_baseline(name, config)
    before = {key: linear.weight for key, linear in target.linears().items()}
    baseline.apply(target, config, windows)
    for key, linear in target.linears().items():
        dense = name != "bf16" and getattr(linear, "_parameters", {}).get("weight") is before[key]
        assert not dense, f"{name} left {key} dense"
