"""What is asked of ``nanoquant estimate`` besides the configuration of the run."""

from __future__ import annotations

from dataclasses import dataclass

from nanoquant.data import DataConfig
from nanoquant.estimate.machine import ASSUMED

HERE = "here"


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """How the run is measured, where it runs, and how the quantized model is used."""

    source: str
    """A published name such as llama-2-7b, a Hub name, or folder of the dense model."""
    context: int | None = None
    """Tokens of prompt and answer of the quantized model; null: 4096, or the model's positions where they are fewer."""
    batch: int = 1
    """Texts at once."""
    eval_windows: int = DataConfig.windows
    """Held-out windows of quantize; 0: no --eval-text is given, and the checkpoint is only verified."""
    eval_length: int = DataConfig.length
    """Tokens of such a window."""
    text: list[str] | str | None = None
    """Calibration text of quantize, of which only self, which the model writes, takes memory and time that is counted;
    none is read. null: as any file."""
    machine: str = HERE
    """Whose time is estimated: here, which is measured in a few seconds, or h100, whose rates are assumed."""
    devices: int = 1
    """How many of them share the initializer, measured ranks, and the training of the model."""
    json: str | None = None
    """File for everything that is printed."""

    def __post_init__(self) -> None:
        if self.machine not in (HERE, *ASSUMED):
            raise ValueError(
                f"machine must be {HERE} or {', '.join(ASSUMED)}, got {self.machine!r}"
            )
        if self.devices < 1 or self.eval_windows < 0 or self.eval_length < 2:
            raise ValueError(
                "devices must be at least 1, eval_windows at least 0 and eval_length at least 2, got "
                f"{self.devices}, {self.eval_windows} and {self.eval_length}"
            )
