"""NanoQuantConfig: the stage configs of the pipeline in one frozen object, and its presets.

Defaults live with the code that reads them; here they are only composed, and presets only change them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torchao.core.config import AOBaseConfig

from nanoquant.admm import ADMMConfig
from nanoquant.block_config import BlockConfig
from nanoquant.budget import BudgetConfig
from nanoquant.embedding import EmbeddingConfig
from nanoquant.importance import ImportanceConfig
from nanoquant.methods import ProductConfig, as_unused, check_method, check_unused
from nanoquant.model_config import ModelConfig
from nanoquant.optimizer import OptimizerConfig
from nanoquant.self_text import SelfTextConfig
from nanoquant.sensitivity import SensitivityConfig
from nanoquant.training import RunConfig

STEPS = ("", "prepare", "convert")
DEFAULT_PRESET = "fast"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How much text the importances are taken from."""

    windows: int = 32
    """Windows of the forward and backward pass; all different."""
    length: int = 512
    """Tokens of a window, in every phase."""
    batch: int = 4
    """Windows a pass, and what the clipping quantile is taken over: 2000 tokens or more let it act."""

    def __post_init__(self) -> None:
        if min(self.windows, self.batch) < 1 or self.length < 2:
            raise ValueError(
                f"windows and batch must be at least 1 and length at least 2, got {self.windows}, "
                f"{self.batch} and {self.length}"
            )


@dataclass(frozen=True, kw_only=True)
class NanoQuantConfig(AOBaseConfig):
    """Everything that decides what a quantization does.

    :func:`nanoquant_config` builds it from a preset.
    """

    method: str = "binary"
    """binary: factors of signs; product: groups of weights looked up in codebooks."""
    preset: str = "custom"
    """What the other fields start from: fast, balanced or best, on more text and passes each; long, for GPUs; paper,
    the published recipe. custom: the defaults of each dataclass."""
    blocks: str = ""
    """Slice of decoder blocks to quantize: 0:10, or 0:30:3 for every third; empty means all, the rest stays dense."""
    step: str = ""
    """For torchao's ``quantize_``: prepare observes, convert factorizes with what was observed, empty needs no data."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Bits and ranks."""
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    """How losses are measured that ranks follow, where budget.allocation says measured."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Amount of text."""
    self_text: SelfTextConfig = field(default_factory=SelfTextConfig)
    """Text that the model writes itself."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """Clipping, shrinkage and curvature of the statistics."""
    admm: ADMMConfig = field(default_factory=ADMMConfig)
    """The initializer of binary factors."""
    product: ProductConfig = field(default_factory=ProductConfig)
    """Groups, codebooks and the initializer of product quantization."""
    block: BlockConfig = field(default_factory=BlockConfig)
    """Block reconstruction."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model reconstruction."""
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    """Storage of the token embedding and the language model head."""
    run: RunConfig = field(default_factory=RunConfig)
    """Devices, precision, seed."""

    def __post_init__(self) -> None:
        check_method(self.method)
        check_unused(self)
        if self.preset not in (*PRESETS, "custom"):
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.step not in STEPS:
            raise ValueError(f"step must be prepare, convert or empty, got {self.step!r}")
        measured = self.budget.allocation == "measured"
        if self.embedding.bits is None and self.budget.file is None:
            raise ValueError(
                "embedding.bits=null lets a budget for the file choose; give budget.file, such as 70MB, or 16, 8 or 4"
            )
        if not measured and self.sensitivity != SensitivityConfig():
            raise ValueError(
                f"sensitivity.* and budget.allocation={self.budget.allocation} exclude each other: nothing would be "
                "measured; take allocation measured, or leave them out"
            )
        self._slice()

    def block_range(self, count: int) -> range:
        """The chosen blocks of a model with ``count`` of them.

        Raises:
            ValueError: ``blocks`` is no slice, or chooses nothing.
        """
        chosen = range(count)[self._slice()]
        if not chosen:
            raise ValueError(f"blocks={self.blocks} chooses none of the {count} decoder blocks")
        return chosen

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NanoQuantConfig:
        """What :meth:`to_dict` gave; fields that are left out have the defaults of their dataclasses.

        Raises:
            TypeError: a field is unknown.
            ValueError: a value is out of its range.
        """
        return _filled(cls(), values)

    def _slice(self) -> slice:
        """What ``blocks`` says, as a slice."""
        parts = self.blocks.split(":") if self.blocks else ["", ""]
        try:
            start, stop, step = (*(int(part) if part else None for part in parts), None)[:3]
            if len(parts) > 3 or step is not None and step < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"blocks must look like 0:10 or 0:30:3, got {self.blocks!r}") from None
        return slice(start, stop, step)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return dataclasses.asdict(self)


def _filled(stage: Any, values: dict[str, Any]) -> Any:  # noqa: ANN401
    """A dataclass with some fields from nested plain values."""
    given = {name: getattr(stage, name, None) for name in values}
    return dataclasses.replace(
        stage,
        **{
            name: _filled(given[name], value) if dataclasses.is_dataclass(given[name]) else value
            for name, value in values.items()
        },
    )


def _fast() -> NanoQuantConfig:
    """Measured ranks, correlated inputs, then signs, scales and norms against the teacher: best per minute."""
    return NanoQuantConfig(
        preset="fast",
        budget=BudgetConfig(allocation="measured"),
        importance=ImportanceConfig(curvature="inputs"),
        admm=ADMMConfig(iterations=40),
        block=BlockConfig(dense_epochs=0, refine_epochs=0),
    )


def _balanced() -> NanoQuantConfig:
    """As fast, on twice the text."""
    return dataclasses.replace(_fast(), preset="balanced", model=ModelConfig(windows=880))


def _best() -> NanoQuantConfig:
    """As balanced, correlated gradients too, three times over the text, in smaller steps at lower rates."""
    return dataclasses.replace(
        _fast(),
        preset="best",
        importance=ImportanceConfig(curvature="both"),
        model=ModelConfig(
            windows=880, epochs=3, batch=1, latent_lr=1e-2, scale_lr=3e-3, evaluations=4
        ),
    )


def _long() -> NanoQuantConfig:
    """34 million different tokens in windows of 2048, for GPUs; nobody has measured it yet."""
    return dataclasses.replace(
        _fast(),
        preset="long",
        calibration=CalibrationConfig(windows=128, length=2048),
        admm=ADMMConfig(),
        model=ModelConfig(windows=16384, batch=4, evaluations=16),
    )


def _paper() -> NanoQuantConfig:
    """The published code's schedule and rates on little text: 16 windows, 4 epochs a stage.

    From the code: rounds per linear, rates of blocks and model (1e-5), shrinkage 0.4, scales from the proxies.
    """
    return NanoQuantConfig(
        preset="paper",
        calibration=CalibrationConfig(windows=16),
        importance=ImportanceConfig(shrinkage=0.4),
        admm=ADMMConfig(refit_sweeps=0),
        block=BlockConfig(dense_epochs=4, refine_epochs=4),
        model=ModelConfig(
            train="scales",
            windows=16,
            epochs=4,
            batch=1,
            scale_lr=1e-5,
            relative_rates=False,
            optimizer=OptimizerConfig(floor=0.0, weight_decay=1e-2),
        ),
    )


PRESETS: dict[str, Callable[[], NanoQuantConfig]] = {
    "fast": _fast,
    "balanced": _balanced,
    "best": _best,
    "long": _long,
    "paper": _paper,
}


def preset_config(preset: str, method: str = "binary") -> NanoQuantConfig:
    """What a preset means for a method: what the method does not read has the defaults of its dataclasses.

    Raises:
        ValueError: there is no such preset or method.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    check_method(method)
    config = PRESETS[preset]()
    if method == config.method:
        return config
    return dataclasses.replace(config, method=method, **as_unused(config, method))


def nanoquant_config(
    bits: float | None = None,
    preset: str = DEFAULT_PRESET,
    **fields: Any,  # noqa: ANN401
) -> NanoQuantConfig:
    """Build a configuration from a preset.

    Example::

        nanoquant_config(bits=0.8, preset="balanced", run=RunConfig(seed=1))
        nanoquant_config(budget={"file": "64MB"}, run={"seed": 1})
        nanoquant_config(bits=2.1, method="product", group=8, codebooks=(8, 8))

    Args:
        bits: bits per weight over the quantized linears; none keeps the default.
        preset: fast, balanced, best, long or paper. For ``method="product"`` it gives text, epochs and rates; bits go
            where codebooks gain most, so ranks are not measured, nor how inputs go together.
        **fields: fields of :class:`NanoQuantConfig` to replace; a stage's config replaces that whole stage, a dict
            fields of the preset's. Fields of :class:`ProductConfig` may stand beside them: ``group=8``.

    Raises:
        ValueError: unknown preset or method, or a value out of its range.
        TypeError: a field that is not there, or a stage that is neither its config nor a dict.
    """
    own = {f.name for f in dataclasses.fields(ProductConfig)} & fields.keys()
    beside = {"product": {name: fields.pop(name) for name in own}} if own else {}
    config = _changed(preset_config(preset, fields.get("method", "binary")), fields)
    config = _changed(config, beside)
    if bits is not None:
        config = dataclasses.replace(config, budget=dataclasses.replace(config.budget, bits=bits))
    return config


def _changed(config: Any, fields: dict[str, Any]) -> Any:  # noqa: ANN401
    """A config, or a stage of it, with fields replaced; dicts change stages that are there."""
    deep = {}
    for name, value in fields.items():
        stage = getattr(config, name, None)
        if not dataclasses.is_dataclass(stage) or isinstance(value, type(stage)):
            deep[name] = value
        elif isinstance(value, dict):
            deep[name] = _changed(stage, value)
        else:
            raise TypeError(f"{name} must be a {type(stage).__name__} or a dict, got {value!r}")
    return dataclasses.replace(config, **deep)
