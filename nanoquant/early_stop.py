"""EarlyStop: a training ends when what it does not train on no longer gains, in its best state."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn


class EarlyStop(L.Callback):
    """Ends a training whose measured loss no longer falls; the untouched state is a candidate for the best.

    Args:
        parameters: what trains.
        measure: the loss, on what does not train; a value that is not finite counts as not lower.
        patience: epochs in a row without a lower one that end the training.
    """

    def __init__(
        self, parameters: list[nn.Parameter], measure: Callable[[], float], patience: int
    ) -> None:
        self.parameters, self.measure, self.patience = parameters, measure, patience
        self.best, self.waited = float("inf"), 0
        self.state: list[Tensor] = []
        self.consider()

    def consider(self) -> None:
        """Measure, and keep the state when it is the best so far."""
        loss = self.measure()
        self.waited = 0 if loss < self.best else self.waited + 1
        if not self.waited:
            self.best, self.state = loss, [p.detach().clone() for p in self.parameters]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop when it is time."""
        self.consider()
        trainer.should_stop = self.waited >= self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back; there is none where no loss was finite."""
        for parameter, value in zip(self.parameters, self.state, strict=bool(self.state)):
            parameter.copy_(value)
