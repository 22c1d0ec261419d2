"""The unfinished whole-model phase on the disk: parameters, moments, best state, and what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from nanoquant.best_state import BestState
from nanoquant.checkpoint_files import read_header
from nanoquant.mapped import forget, map_tensors
from nanoquant.processes import broadcast
from nanoquant.resuming import Start, moments_of, read_moments
from nanoquant.shards import cut
from nanoquant.tensor_file import TensorFile
from nanoquant.training import Reconstruction


@dataclass
class ModelState:
    """Keeps a training now and then, and puts it back.

    Args:
        file: where it is kept.
        every: seconds between two writes.
    """

    file: TensorFile
    every: float

    def done(self) -> int:
        """Steps that the file has; errors as of :meth:`resume`."""
        return self.file.values().get("step", 0)

    @torch.no_grad()
    def resume(self, keeper: BestState) -> Start:
        """Put parameters, best state and report of the file into ``keeper``; a start of 0 where there is none.

        Raises:
            ValueError: the file belongs to another run.
        """
        values = self.file.values()
        if not values:
            return Start()
        stored = map_tensors(read_header(self.file.path)[0])
        keeper.state, moments = [], read_moments(stored)
        for number, parameter in enumerate(keeper.parameters):
            now, best = stored[f"parameter.{number}"], stored[f"best.{number}"]
            kept = moments.get(number, {})
            parameter.copy_(cut(now, parameter))
            keeper.state.append(cut(best, parameter))
            for name, moment in kept.items():
                like = parameter if moment.shape == parameter.shape else moment
                moments[number][name] = cut(moment, like)
                forget([moment])
            forget([now, best])
        report = values["report"]
        report["held_out"] = {int(step): value for step, value in report["held_out"].items()}
        vars(keeper.report).update(report)
        return Start(values["step"], keeper.report.undone, moments)

    def looks(self) -> list[int] | None:
        """Steps at which held-out windows are still to be looked at; None where nothing is kept."""
        return self.file.values().get("looks")

    def keep(self, module: Reconstruction, keeper: BestState, looks: list[int]) -> None:
        """Write when the first process finds that it is time, before a step of ``module``."""
        if self.file.path is None or not broadcast(self.file.age() >= self.every):
            return
        tensors = {f"parameter.{n}": p for n, p in enumerate(keeper.parameters)}
        tensors |= {f"best.{n}": tensor for n, tensor in enumerate(keeper.state)}
        report = asdict(keeper.report) | {"undone": module.result.undone}
        values = {"step": module.step, "looks": looks, "report": report}
        moments = moments_of(module.optimizers(use_pl_optimizer=False))
        self.file.write(tensors | moments, values)
