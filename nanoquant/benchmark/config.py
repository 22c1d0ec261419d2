"""Settings of the benchmark, and the lists that they spell with commas."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from nanoquant.benchmark.shapes import CONFIGS
from nanoquant.embedding import EmbeddingConfig

PARTS = ("shapes", "chain", "model")
LEAST_REPEATS = 20


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured and how."""

    model: str = ",".join(CONFIGS)
    """Models, separated by commas: names of published ones, or folders with a config.json; weights are random."""
    config_only: str | None = None
    """Measure one model end to end, and the chain of its linears, instead of --model; needs its configuration only."""
    parts: str = ",".join(PARTS)
    """What to measure: shapes (each linear shape), chain (all linears of a model), model (decoding end to end)."""
    bits: str = "1.0,0.8,0.55"
    """Bits per weight, separated by commas."""
    tokens: str = "1,2,4,8,16,64,256,2048"
    """Numbers of tokens at once, separated by commas, for shapes and chain."""
    layers: int | None = None
    """Cut every model to its first layers; null measures it whole."""
    context: int = 128
    """Tokens in the key-value cache before decoding begins."""
    embedding_bits: int = EmbeddingConfig.bits
    """Bits of embedding and head in the packed models of part model: 16, 8 or 4; the dense model keeps 16."""
    repeats: int = LEAST_REPEATS
    """How often each figure is taken; the median counts."""
    most_seconds: float = 20.0
    """Longest time for all repeats of one figure; what would take longer is absent."""
    rotate_megabytes: int | None = None
    """Memory that weights rotate over; null takes 4 times the last cache, 256 at least, as far as memory reaches."""
    most_error: float = 8e-3
    """Largest relative error against float64; the plain bf16 reference comes to 4e-3. What is above is refused."""
    device: str = "auto"
    """auto takes a GPU if there is one; cpu or cuda."""
    seed: int = 0
    """Seed of the random weights and activations."""
    json: str | None = None
    """File for every printed figure."""
    plot: str | None = None
    """PNG file for a roofline plot; needs matplotlib."""
    show: str | None = None
    """File that --json wrote, of a finished run or not: print its tables and draw --plot, measure nothing."""

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.show is not None and (more := set(given) - {"show", "plot"}):
            flags = ", ".join(_flag(name) for name in given if name in more)
            raise ValueError(f"--show measures nothing, so {flags} can't go with it; --plot can")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 to {2**63 - 1}, got {self.seed}")
        if self.config_only is not None and len(_listed(self.config_only)) != 1:
            raise ValueError(f"--config-only takes one model, got {self.config_only!r}")
        if self.config_only is not None and "model" in given:
            raise ValueError("--model and --config-only name models both; give one of them")
        if self.repeats < LEAST_REPEATS:
            raise ValueError(f"repeats must be at least {LEAST_REPEATS}, got {self.repeats}")
        for name in ("context", "most_seconds", "most_error"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.rotate_megabytes is not None and self.rotate_megabytes < 1:
            raise ValueError(f"rotate_megabytes must be at least 1, got {self.rotate_megabytes}")
        unknown = [part for part in self.parts_asked if part not in PARTS]
        if self.config_only is not None and _listed(self.parts) == ["shapes"]:
            raise ValueError("--config-only leaves shapes out; name the model with --model instead")
        if unknown or not self.parts_asked:
            raise ValueError(f"parts are {', '.join(PARTS)}, got {self.parts!r}")
        if self.plot is not None and "shapes" not in self.parts_asked:
            raise ValueError("a plot shows linear shapes; measure them, without --config-only")
        if self.json is not None and self.json == self.plot:
            raise ValueError(f"--json and --plot are the same file, {self.json}; give two")
        if not self.models:
            raise ValueError(f"give at least one model: {', '.join(CONFIGS)}, or a folder")
        self.numbers("bits", float)
        self.numbers("tokens", int)
        EmbeddingConfig(bits=self.embedding_bits)

    @property
    def parts_asked(self) -> list[str]:
        """Names of the parts to measure."""
        parts = _listed(self.parts)
        return parts if self.config_only is None else [part for part in parts if part != "shapes"]

    @property
    def times_linears(self) -> bool:
        """Whether a part times linear layers, which takes memory to rotate over."""
        return bool({"shapes", "chain"} & set(self.parts_asked))

    @property
    def models(self) -> list[str]:
        """Names of the models to measure."""
        names = _listed(self.model) if self.config_only is None else [self.config_only]
        return list(dict.fromkeys(names))

    def numbers(self, name: str, kind: type) -> list[Any]:
        """The numbers of a field, each once.

        Raises:
            ValueError: there is none, or one is not above 0.
        """
        text = getattr(self, name)
        try:
            values = [kind(item) for item in _listed(text)]
        except ValueError:
            values = []
        if not values or not all(0 < value < math.inf for value in values):
            what = "whole numbers of at least 1" if kind is int else "numbers above 0"
            raise ValueError(f"{name} must be {what}, separated by commas, got {text!r}")
        return list(dict.fromkeys(values))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
