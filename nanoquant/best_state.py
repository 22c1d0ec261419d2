"""The best state of a training on held-out windows; the untouched one is a candidate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass
class ModelReport:
    """Losses of training steps, divergence on held-out windows, the step whose state was kept, steps undone."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    undone: int = 0


@dataclass
class BestState:
    """Keeps a copy of the parameters from where the measured divergence was lowest."""

    parameters: list[nn.Parameter]
    measure: Callable[[], float]
    locate: Callable[[], str]
    report: ModelReport
    state: list[Tensor] = field(default_factory=list)

    def consider(self, step: int) -> None:
        """Measure, and keep the state when it is the best so far.

        Raises:
            FloatingPointError: the first measurement is not finite.
        """
        value = self.measure()
        logger.info("model reconstruction, step %d: held-out divergence %.4f", step, value)
        if not self.report.held_out and not math.isfinite(value):
            raise FloatingPointError(
                f"the divergence of the student is {value} before any training, first in {self.locate()}; "
                "look at the weights and inputs of that layer in the dense model"
            )
        if value < min(self.report.held_out.values(), default=float("inf")):
            self.state = [p.detach().clone() for p in self.parameters]
            self.report.best_step = step
        self.report.held_out[step] = value if math.isfinite(value) else float("inf")

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back."""
        for parameter, value in zip(self.parameters, self.state, strict=True):
            parameter.copy_(value)
