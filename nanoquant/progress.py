"""What long work tells its caller: the phase, how far it is, and seconds per phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Follows phases and keeps their seconds; a subclass may show them.

    Example::

        with progress.phase("calibrate", total=32):
            progress.advance(1)
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Time a phase of ``total`` units."""
        begun = time.perf_counter()
        self.begin(name, total)
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - begun
            self.end()

    def begin(self, name: str, total: int) -> None:
        """A phase starts."""

    def advance(self, done: int, note: str = "") -> None:
        """``done`` more units of the current phase; ``note`` is a short state such as the loss."""

    def step(self, done: int, total: int) -> None:
        """One more unit, for functions that call back with (done, total)."""
        self.advance(1)

    def end(self) -> None:
        """The current phase is over."""
