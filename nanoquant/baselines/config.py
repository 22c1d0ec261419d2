"""Settings that baselines share."""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZES = (32, 64, 128, 256)
"""What torchao's int4 takes."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """What is chosen for all baselines of a run; each reads what concerns it."""

    text: str | None = None
    """Calibration text of awq4, awq3, awq2 and nanoquant-init, never the text of the evaluation."""
    windows: int = 8
    """Windows of calibration text."""
    length: int = 512
    """Tokens of such a window."""
    group_size: int = 64
    """Weights of a row that share a scale in int4 to int1, hqq and awq: 32, 64, 128 or 256."""
    bits: float = 1.0
    """Bits per weight of sign-svd, dual-svid and nanoquant-init; a name such as sign-svd@0.8 sets them for itself."""
    seed: int = 0
    """Seed of nanoquant-init."""

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size must be one of {allowed}, got {self.group_size}")
        if self.windows < 1 or self.length < 2:
            raise ValueError(
                f"windows must be at least 1 and length at least 2, got {self.windows} and {self.length}"
            )
        if not self.bits > 0:
            raise ValueError(f"bits must be above 0, got {self.bits}")
