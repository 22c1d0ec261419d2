"""The two methods behind one pipeline, binary factors and product quantization, and all that differs between them.

A layer of either knows how it computes, what trains in it and what it stores. Here stands what else the phases ask:
which layers a budget buys, which initializer serves, and how a layer comes from factors or from kept tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.binary import BinaryFactors
from nanoquant.budget import Shapes, allocate_ranks, count_weights, layer_bits, rank_limits
from nanoquant.codebooks import ProductFactors
from nanoquant.importance import Importance
from nanoquant.kmeans import LloydConfig
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.product import KMeansConfig, KMeansInitializer
from nanoquant.product_budget import MENU, ProductShape, plan_product, product_bits
from nanoquant.product_linear import ProductQuantLinear

if TYPE_CHECKING:
    from nanoquant.config import NanoQuantConfig

Size = int | ProductShape
"""What a budget gives a linear: the rank of binary factors, or group, widths and slabs of codebooks."""
Sizes = dict[str, Size]
"""Full name of a linear to its size."""
Factors = BinaryFactors | ProductFactors
Layer = BinaryLowRankLinear | ProductQuantLinear
"""A quantized linear that trains."""
Initializer = Callable[[Tensor, Importance, Size, torch.Generator], Factors]
"""(weights W (B, d_out, d_in), their importances, size, generator) to factors of a batch."""


@dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """What product quantization looks weights up in."""

    group: int | None = None
    """Consecutive inputs that share an index; null: as the bits ask for, linear by linear."""
    codebooks: tuple[int, ...] | None = None
    """Bits of the index of each codebook, the second one for what the first leaves: [8] or [8,6]; null: as the bits
    ask for. How many ranges of rows have codebooks of their own always follows from the bits."""
    residual: bool | None = None
    """Whether every linear has a second codebook for what the first leaves; null: as the bits ask for."""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    """How codebooks, indices and scales are found."""

    def __post_init__(self) -> None:
        if self.codebooks is not None:
            object.__setattr__(self, "codebooks", tuple(self.codebooks))  # JSON gives a list
        if not self.menu:
            known = ", ".join(str(ProductShape(*key)) for key in MENU)
            raise ValueError(
                f"product.group={self.group}, product.codebooks={self.codebooks} and product.residual="
                f"{self.residual} together are none of the kinds that are planned: {known} (group:widths); null "
                "leaves the choice to the bits"
            )

    @property
    def menu(self) -> dict[tuple[int, tuple[int, ...]], float]:
        """The planner's menu, (group, widths) to distortion, as far as it is allowed."""
        return {
            (group, widths): distortion
            for (group, widths), distortion in MENU.items()
            if self.group in (None, group)
            and self.codebooks in (None, widths)
            and self.residual in (None, len(widths) > 1)
        }


@dataclass(frozen=True)
class Method:
    """A way to quantize linears.

    Args:
        initializer: of a config.
        trial: initializer that does the least.
        plan: sizes that meet the budget of a config without knowing more than (d_out, d_in) of each linear; raises
            ValueError where none do.
        check: raises the same for a config whose sizes follow from more than that.
        steps: what sizes come in, for messages.
        parts: most tensors that a packed layer stores, besides its bias.
        unused: stages and fields of a config that it does not read.
    """

    initializer: Callable[[NanoQuantConfig], Initializer]
    trial: Initializer
    plan: Callable[[Shapes, NanoQuantConfig], Sizes]
    check: Callable[[Shapes, NanoQuantConfig], Any]
    steps: Callable[[NanoQuantConfig], str]
    parts: tuple[str, ...]
    unused: tuple[str, ...]


def _plan_product(shapes: Shapes, config: NanoQuantConfig) -> Sizes:
    return plan_product(shapes, config.budget.bits, config.product.menu)


METHODS = {
    "binary": Method(
        initializer=lambda config: ADMMInitializer(config.admm),
        trial=ADMMInitializer(ADMMConfig(iterations=2)),
        plan=lambda shapes, config: allocate_ranks(shapes, config.budget),
        check=lambda shapes, config: rank_limits(shapes, config.budget),
        steps=lambda config: f"ranks in multiples of {config.budget.rank_multiple}",
        parts=("u_signs", "v_signs", "s1", "s2"),
        unused=("product", "block.codebook_lr", "block.reassign", "model.codebook_lr"),
    ),
    "product": Method(
        initializer=lambda config: KMeansInitializer(config.product.kmeans),
        trial=KMeansInitializer(KMeansConfig(lloyd=LloydConfig(iterations=1), rounds=1)),
        plan=_plan_product,
        check=_plan_product,
        steps=lambda config: "indices and codebooks",
        parts=("indices", "codebook", "indices2", "codebook2", "scale"),
        unused=(
            *("admm", "budget.allocation", "budget.rank_multiple", "importance.curvature"),
            *("block.latent_lr", "model.latent_lr"),
        ),
    ),
}


def method_of(config: NanoQuantConfig) -> Method:
    """The method that a config asks for."""
    return METHODS[config.method]


def check_method(method: str) -> None:
    """Refuse a method that there is not."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def check_unused(config: NanoQuantConfig) -> None:
    """Refuse what a config says to no effect.

    Raises:
        ValueError: a stage or field that its method does not read is changed.
    """
    for path in method_of(config).unused:
        value, default = _value(config, path), _default(config, path)
        if value != default:
            given = f"{path}.*" if dataclasses.is_dataclass(value) else f"{path}={value}"
            raise ValueError(
                f"{given} and method={config.method} exclude each other: it would change nothing; leave it out"
            )


def as_unused(config: NanoQuantConfig, method: str) -> dict[str, Any]:
    """Stages of a config, by name, with the defaults of their dataclasses where a method does not read them."""
    stages: dict[str, Any] = {}
    for path in METHODS[method].unused:
        stage, _, name = path.partition(".")
        before, default = stages.get(stage, getattr(config, stage)), _default(config, path)
        stages[stage] = dataclasses.replace(before, **{name: default}) if name else default
    return stages


def _value(config: NanoQuantConfig, path: str) -> Any:  # noqa: ANN401
    """A stage, or by a dotted name a field of one."""
    stage, _, name = path.partition(".")
    return getattr(getattr(config, stage), name) if name else getattr(config, stage)


def _default(config: NanoQuantConfig, path: str) -> Any:  # noqa: ANN401
    """The same as its dataclass has it."""
    stage, _, name = path.partition(".")
    fresh = type(getattr(config, stage))()
    return getattr(fresh, name) if name else fresh


def stored_bits(shape: tuple[int, int], size: Size) -> int:
    """Stored bits of a linear (d_out, d_in) of either method, without its bias."""
    return (product_bits if isinstance(size, ProductShape) else layer_bits)(*shape, size)


@dataclass(frozen=True)
class Trained:
    """Numbers of linears that may train."""

    latents: int
    """Behind signs, which the packed form has in their place."""
    entries: int
    """Of codebooks."""
    scales: int

    @property
    def weights(self) -> int:
        """What scales multiply."""
        return self.latents + self.entries


def trained_numbers(shapes: Shapes, sizes: Mapping[str, Size]) -> Trained:
    """Numbers of these linears together."""
    latents = entries = scales = 0
    for name, size in sizes.items():
        d_out, d_in = shapes[name]
        if isinstance(size, ProductShape):
            entries += size.slabs * size.group * sum(size.entries)
            scales += d_out
        else:
            latents += (d_out + d_in) * size
            scales += d_out + d_in
    return Trained(latents, entries, scales)


def sizes_summary(sizes: list[Size]) -> dict[str, Any]:
    """The range of ranks, or codebooks as "8:8 x2" with how often each comes."""
    if isinstance(sizes[0], ProductShape):
        often = Counter(map(str, sizes)).most_common()
        return {"codebooks": ", ".join(f"{what} ({count})" for what, count in often)}
    return {
        "least rank": min(sizes),
        "mean rank": round(math.fsum(sizes) / len(sizes), 1),
        "largest rank": max(sizes),
    }


def body_bits(shapes: Shapes, sizes: Mapping[str, Size]) -> float:
    """Bits per weight of the quantized linears together (Eq. 60)."""
    bits = sum(stored_bits(shapes[name], size) for name, size in sizes.items())
    return bits / count_weights({name: shapes[name] for name in sizes})


def entry_of(size: Size) -> dict[str, Any]:
    """A size as it is on record: {"rank": r}, or group, widths and slabs."""
    return dataclasses.asdict(size) if isinstance(size, ProductShape) else {"rank": size}


def size_of(entry: Mapping[str, Any]) -> Size:
    """The size of an entry of :func:`entry_of`, from JSON as well."""
    if "rank" in entry:
        return entry["rank"]
    return ProductShape(entry["group"], tuple(entry["widths"]), entry["slabs"])


def layer_size(layer: Layer) -> Size:
    """Rank, or shape of the codebooks."""
    return layer.shape if isinstance(layer, ProductQuantLinear) else layer.rank


def layer_of(factors: Factors, bias: Tensor | None) -> Layer:
    """The layer that trains the factors of one matrix."""
    kind = ProductQuantLinear if isinstance(factors, ProductFactors) else BinaryLowRankLinear
    return kind.from_factors(factors, bias)


def kept_layer(d_out: int, d_in: int, parts: Mapping[str, Tensor]) -> Layer:
    """The layer whose state is ``parts``, which it takes without a copy."""
    bias = "bias" in parts
    if "codebook" in parts:
        books = [parts[name] for name in ("codebook", "codebook2") if name in parts]
        layer = ProductQuantLinear(d_in, d_out, ProductShape.of(books), bias, "meta")
    else:
        latent = "U" in parts
        rank = parts["U"].shape[1] if latent else len(parts["v_signs"])
        layer = BinaryLowRankLinear(d_in, d_out, rank, bias, "meta")
        layer = layer if latent else layer.freeze()
    layer.load_state_dict(parts, assign=True)
    return layer
