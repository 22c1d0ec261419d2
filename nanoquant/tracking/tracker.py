"""RunTracker: one job's recorder. It writes the run folder, and passes everything on to loggers.

A logger that fails is named once and left out from there on; the run and the local files go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from nanoquant.console import ConsoleProgress
from nanoquant.memory import forget_peaks, peak_bytes
from nanoquant.tracking.folder import RunFolder
from nanoquant.tracking.sinks import Sink, one_line

logger = logging.getLogger(__name__)

RECORDED_PHASES = {
    "measure dense": "evaluate",
    "calibrate": "calibrate",
    "ranks": "ranks",
    "blocks": "block",
    "model": "model",
}
"""Phases of the job that leave seconds and memory in metrics.jsonl; run.json has all."""


class RunTracker:
    """A recorder that also follows phases and the end of a run.

    Args:
        folder: of the run.
        sinks: loggers.
        begun: ``time.perf_counter()`` that record times count from; now by default.
    """

    wanted = True

    def __init__(
        self, folder: RunFolder, sinks: list[Sink] | None = None, begun: float | None = None
    ) -> None:
        self.folder, self.sinks = folder, list(sinks or [])
        self.begun = time.perf_counter() if begun is None else begun

    def record(
        self,
        phase: str,
        *,
        block: int | None = None,
        layer: str | None = None,
        step: int | None = None,
        **metrics: Any,  # noqa: ANN401
    ) -> None:
        """Write one line, and hand it to every logger."""
        seconds = round(time.perf_counter() - self.begun, 3)
        line = {"t": seconds, "phase": phase, "block": block, "layer": layer, "step": step}
        line |= metrics
        self.folder.append(line)
        self._each("record", line)

    def begin(self, name: str) -> None:
        """A phase of the job starts."""
        forget_peaks()
        self.folder.update(phase=name)

    def end(self, name: str, seconds: dict[str, float]) -> None:
        """A phase of the job is over; ``seconds`` are those of all phases so far."""
        peaks = peak_bytes()
        if name in RECORDED_PHASES:
            self.record(RECORDED_PHASES[name], seconds=seconds[name], **peaks)
        memory = self.folder.content.get("memory_bytes", {}) | {
            name: max(peaks.values(), default=0)
        }
        self.folder.update(seconds=dict(seconds), memory_bytes=memory)
        self._each("flush")

    def finish(self, status: str, error: str | None = None) -> None:
        """Write the end of the run, and close everything."""
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        self.folder.close()
        self.folder.update(status=status, error=error, phase=None, ended=ended)
        self._each("finish", self.folder.content)

    def _each(self, method: str, *arguments: Any) -> None:  # noqa: ANN401
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:  # a logger may raise anything, and none is worth the run
                self.sinks.remove(sink)
                logger.warning("%s is left out from here on: %s", sink.name, one_line(error))

    @contextmanager
    def following(self) -> Iterator[None]:
        """Say in run.json how the work inside ends, whatever ends it."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self.finish("failed", "interrupted" if stopped else f"{type(error).__name__}: {error}")
            raise
        self.finish("finished")


class TrackedProgress(ConsoleProgress):
    """Shows phases, and tells them to a tracker once there is one."""

    tracker: RunTracker | None = None

    def follow(self, tracker: RunTracker) -> None:
        """Tell ``tracker`` from now on, and at once what is over already."""
        self.tracker = tracker
        for name in self.seconds:
            tracker.end(name, self.seconds)

    def begin(self, name: str, total: int) -> None:
        """A phase starts."""
        self.name = name
        super().begin(name, total)
        if self.tracker is not None:
            self.tracker.begin(name)

    def end(self) -> None:
        """The current phase is over."""
        super().end()
        if self.tracker is not None:
            self.tracker.end(self.name, self.seconds)
