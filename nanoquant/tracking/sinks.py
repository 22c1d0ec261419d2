"""What a place for records looks like."""

from __future__ import annotations

from typing import Any, Protocol

MOST_CHARACTERS = 300


class Sink(Protocol):
    """Where records go besides the folder; may raise anything."""

    name: str

    def record(self, record: dict[str, Any]) -> None:
        """Take one record."""

    def flush(self) -> None:
        """A phase has ended."""

    def finish(self, run: dict[str, Any]) -> None:
        """The run is over; ``run`` is the content of run.json."""


def one_line(error: Exception) -> str:
    """The message of an error in one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:MOST_CHARACTERS]
