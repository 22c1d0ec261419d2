"""Weights of the kinds of linears under the prior allocation; what a linear is for is found in ``roles``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoleWeights:
    """How many bits per weight a kind of linear gets under the prior, relative to the others."""

    q: float = 0.85
    """Queries."""
    k: float = 0.9
    """Keys."""
    v: float = 1.1
    """Values."""
    o: float = 1.0
    """Output of the attention."""
    gate: float = 1.0
    """Gate of the MLP."""
    up: float = 1.05
    """Input of the MLP."""
    down: float = 1.15
    """Output of the MLP."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"roles.{name} must be above 0, got {value}; 1 is neutral")

    def of(self, role: str) -> float:
        """Weight of a role: the mean over the parts of a fused one such as ``q+k+v``, 1 where it is empty."""
        parts = [getattr(self, part) for part in role.split("+") if part]
        return sum(parts) / len(parts) if parts else 1.0
