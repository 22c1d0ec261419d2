"""Course: what happens beside the steps of the whole model's training: held-out looks, records, copies on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanoquant.best_state import BestState
from nanoquant.layer_records import ModelWatch
from nanoquant.methods import Layer
from nanoquant.model_state import ModelState
from nanoquant.recorder import Recorder
from nanoquant.resuming import Start
from nanoquant.training import Reconstruction


@dataclass
class Course:
    """Follows one training; :meth:`begin` comes first."""

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
    looks: list[int] = field(default_factory=list)
    """Steps at which held-out windows are still to be looked at."""

    def begin(self) -> Start:
        """Put back what the state has, or look at the untouched student; gives where the training begins."""
        start = Start() if self.state is None else self.state.resume(self.keeper)
        looks = None if self.state is None else self.state.looks()
        if looks is None:
            count = self.evaluations
            looks = sorted({self.steps * k // count for k in range(count)})
        self.looks = looks
        self.watch = ModelWatch(self.recorder, self.layers, self.steps)
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
