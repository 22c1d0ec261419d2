"""What one training leaves: its losses, and how much of it was undone."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FitResult:
    """Loss of each step, in order, how many steps were undone, and how many epochs ran."""

    losses: list[float] = field(default_factory=list)
    undone: int = 0
    epochs: int = 0

    def __add__(self, more: FitResult) -> FitResult:
        """One training after the other."""
        return FitResult(
            self.losses + more.losses, self.undone + more.undone, self.epochs + more.epochs
        )
