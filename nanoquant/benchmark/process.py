"""Models that are compared run in processes of their own and take their steps in turn.

A process an arm makes its peak memory its own; taking turns, what the machine does meanwhile hits all arms.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from nanoquant.benchmark.timing import TRIALS, AbsentError, check_duration, fastest, timing
from nanoquant.console import quiet

PAUSE = 0.01
"""Seconds before each step, in which the threads of the arm before stop spinning for more work."""

if TYPE_CHECKING:
    from nanoquant.benchmark.model import (
        Arm,  # the process silences transformers before it imports it
    )


def serve(pipe: Connection) -> None:
    """The process of an arm: receive it, build its model, answer "step" with seconds and "end" with memory figures."""
    quiet()
    try:
        arm: Arm = pipe.recv()
        from nanoquant.benchmark.model import Decoding, build, fill, memory_figures, resident_bytes
        from nanoquant.shared_launch import prepare_for_decoding

        torch.set_num_threads(arm.threads)
        torch.manual_seed(arm.seed)
        before = resident_bytes()["VmRSS"]
        model = fill(build(arm.config, arm.ranks, arm.embedding_bits), arm.device)
        prepare_for_decoding(model)  # as nanoquant.generate does
        if arm.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of generation; moving the head in counts twice
        decoding = Decoding(model, arm.context, arm.repeats + TRIALS)
        pipe.send(None)
        while pipe.recv() == "step":
            pipe.send(decoding.seconds())
        pipe.send(memory_figures(model, before))
    except (RuntimeError, ValueError, MemoryError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
    except (EOFError, KeyboardInterrupt):
        pass  # the other end is gone


class Process:
    """An arm in a process of its own, until it is closed."""

    def __init__(self, arm: Arm) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.send(arm)

    def ask(self, question: str | None = None) -> Any:  # noqa: ANN401
        """The answer to a question; without one, wait until the model is ready.

        Raises:
            AbsentError: the process failed or died.
        """
        try:
            if question is not None:
                self.pipe.send(question)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise AbsentError("its process died, perhaps for lack of memory") from None
        if isinstance(answer, str):
            raise AbsentError(answer)
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def time_arms(arms: list[Arm], absent: Callable[[str, str], None]) -> dict[str, dict[str, Any]]:
    """Tokens a second and memory of every arm that can be run; steps are taken in turn.

    Args:
        arms: models to compare; all are in memory at once.
        absent: told the name and the reason where an arm has no figure.
    """
    running = {arm.name: Process(arm) for arm in arms}
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    figures = {}
    try:
        for arm in arms:
            _try(arm.name, running, absent, lambda arm=arm: _ready(running[arm.name], arm))
        for _ in range(max(arm.repeats for arm in arms)):
            for name in list(running):
                time.sleep(PAUSE)
                _try(name, running, absent, lambda n=name: taken[n].append(running[n].ask("step")))
        for name in list(running):
            _try(name, running, absent, lambda n=name: figures.update({n: running[n].ask("end")}))
    finally:
        for process in running.values():
            process.close()
    for name, memory in figures.items():
        step = timing(taken[name])
        memory |= {"tokens_per_s": 1 / step.seconds, "milliseconds": step.seconds * 1e3}
        memory["spread"] = step.spread
    return figures


def _ready(process: Process, arm: Arm) -> None:
    """Wait for the model, and take some steps to see how long all of them would take."""
    process.ask()
    once = fastest(lambda: process.ask("step"), arm.most_seconds)
    check_duration(once, arm.repeats, arm.most_seconds)


def _try(
    name: str,
    running: dict[str, Process],
    absent: Callable[[str, str], None],
    action: Callable[[], object],
) -> None:
    """Do something with an arm; one that fails is ended and absent."""
    try:
        action()
    except AbsentError as error:
        absent(name, str(error))
        running.pop(name).close()
