"""AdamW, its schedule, and how wide its moments are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

STATE_BITS = (32, 8, 4)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its cosine schedule; rates belong to the objective's parameter groups."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, per step and unit rate."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0 leaves them as they are."""
    warmup: int = 0
    """Steps of linear warm-up."""
    floor: float = 1e-4
    """Last rate of the cosine as a share of the first."""
    state_bits: int = 32
    """Bits of a moment: 32, or 8 or 4 by torchao, for tensors of 4096 entries or more; made for GPUs, slow on CPUs."""

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"beta1 and beta2 must lie in [0, 1), got {self.beta1} and {self.beta2}"
            )
        for name in ("epsilon", "weight_decay", "clip_norm", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(
                f"floor is a share of the first rate, 0 to 1, got {self.floor}; 0 ends at rest"
            )
        if self.state_bits not in STATE_BITS:
            raise ValueError(f"state_bits must be 32, 8 or 4, got {self.state_bits}")

    def rate(self, step: int, steps: int) -> float:
        """Share of the full rate at ``step`` of ``steps``: warm-up, then a cosine down to the floor."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, or torchao's with moments of 8 or 4 bits."""
    settings = {
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.state_bits == 32:
        return torch.optim.AdamW(groups, **settings, fused=True)
    from torchao.optim import AdamW4bit, AdamW8bit

    return (AdamW8bit if config.state_bits == 8 else AdamW4bit)(groups, **settings)
