"""Course: a training of the whole model, and beside its steps held-out looks, records and copies on the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from nanoquant.best_state import BestState
from nanoquant.kept_logits import collate
from nanoquant.layer_records import ModelWatch
from nanoquant.methods import Layer
from nanoquant.model_state import ModelState
from nanoquant.non_finite import StaysNonFiniteError
from nanoquant.optimizer import OptimizerConfig
from nanoquant.recorder import Recorder
from nanoquant.resuming import Order, Start
from nanoquant.training import Reconstruction, fit

logger = logging.getLogger(__name__)


@dataclass
class Course:
    """Follows one training, :meth:`run`."""

    keeper: BestState
    """Measures, and keeps the best state."""
    layers: Mapping[str, Layer]
    """Those that train."""
    recorder: Recorder
    """Takes losses, divergences, rates, flipped signs and latents."""
    steps: int
    """Of the whole training."""
    evaluations: int
    """How often the held-out windows are looked at, the start not counted."""
    rate: Callable[[int], float]
    """Learning rate of a step, for the record."""
    on_step: Callable[[int, float], None] | None
    """Called with (step, loss)."""
    state: ModelState | None
    """Keeps the training, and goes on with what it has."""
    looks: list[int] = field(init=False)
    """Steps at which held-out windows are still to be looked at."""
    watch: ModelWatch = field(init=False)
    """Records flipped signs and latents."""

    def run(
        self,
        objective: nn.Module,
        windows: Dataset,
        order: Order,
        optimizer: OptimizerConfig,
        precision: str,
        loggers: list[Any] | None = None,
        ways: AbstractContextManager[None] | None = None,
    ) -> None:
        """Train, look at the held-out windows now and then, and put the best state back.

        Args:
            objective: as :func:`nanoquant.training.fit` takes it.
            windows: training tokens, a window (T,) at a time.
            order: batches of all epochs.
            optimizer: AdamW settings.
            precision: Lightning precision.
            loggers: Lightning loggers.
            ways: context of the steps; held-out windows are first measured outside.

        Raises:
            StaysNonFiniteError: training stays non-finite before any state was better than the untouched one.
        """
        report, start = self.keeper.report, self.begin()
        order.start = start.step
        loader = DataLoader(windows, batch_sampler=order, collate_fn=collate)
        try:
            with ways or nullcontext():
                result = fit(
                    *(objective, loader, optimizer),
                    epochs=1,  # the order has all of them
                    precision=precision,
                    on_step=self.follow,
                    loggers=loggers,
                    start=start,
                    at_snapshot=self.keep,
                )
        except StaysNonFiniteError as error:
            report.undone = error.undone
            if not report.best_step:
                raise
            text = "%s; training ends here, and the state of step %d is kept"
            logger.warning(text, error, report.best_step)
        else:
            report.undone = result.undone
            self.finish()
        self.keeper.restore()

    def begin(self) -> Start:
        """Put back what the state has, or look at the untouched student; gives where the training begins."""
        start = Start() if self.state is None else self.state.resume(self.keeper)
        looks = None if self.state is None else self.state.looks()
        if looks is None:
            count = self.evaluations
            looks = sorted({self.steps * k // count for k in range(count)})
        self.looks = looks
        self.watch = ModelWatch(self.recorder, self.layers, self.steps, start.step)
        if looks and looks[0] == 0:
            self.look(looks.pop(0))
        return start

    def look(self, step: int) -> None:
        """Measure the held-out windows, and keep the state if it is the best."""
        self.keeper.consider(step)
        self.recorder.record("model", step=step, held_out=self.keeper.report.held_out[step])

    def follow(self, step: int, loss: float) -> None:
        """One step, before its parameters move."""
        if self.looks and step >= self.looks[0]:  # a step that was undone is not followed
            self.looks.pop(0)
            self.look(step)
        self.keeper.report.losses.append(loss)
        self.watch.step(step, loss=loss, rate=self.rate(step))
        if self.on_step is not None:
            self.on_step(step, loss)

    def keep(self, module: Reconstruction) -> None:
        """Keep the training where it is time."""
        if self.state is not None:
            self.state.keep(module, self.keeper, self.looks)

    def finish(self) -> None:
        """The last state that training reached."""
        self.watch.finish(self.steps)
        self.look(self.steps)
