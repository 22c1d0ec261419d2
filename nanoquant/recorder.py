"""What long work records beside its progress: figures of layers, blocks and steps, for whoever keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

PHASES = ("calibrate", "ranks", "initialize", "block", "model", "evaluate")
"""Phases that records name, in order; "initialize" and "block" take turns."""
POINTS = 64
"""Most losses that one loop over a block leaves."""


class Recorder(Protocol):
    """Takes records; it must not raise, because a run is worth more than its record."""

    wanted: bool
    """False: figures that cost something are not computed."""

    def record(
        self,
        phase: str,
        *,
        block: int | None = None,
        layer: str | None = None,
        step: int | None = None,
        **metrics: Any,  # noqa: ANN401
    ) -> None:
        """Keep numbers, short texts or lists of numbers.

        Args:
            phase: one of ``PHASES``.
            block: index of the decoder block.
            layer: name of the linear.
            step: optimizer step, counted from 0 within the block or the model.
            metrics: by name.
        """


class Unrecorded:
    """Keeps nothing."""

    wanted = False

    def record(self, phase: str, **metrics: Any) -> None:  # noqa: ANN401
        """Forget it."""


UNRECORDED = Unrecorded()


@dataclass
class RecordBuffer:
    """Keeps records for a recorder in another process, or for later."""

    wanted: bool
    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def record(self, phase: str, **metrics: Any) -> None:  # noqa: ANN401
        """Keep it."""
        self.records.append((phase, metrics))

    def replay(self, recorder: Recorder) -> None:
        """Pass all of them on, in order."""
        for phase, metrics in self.records:
            recorder.record(phase, **metrics)


@dataclass(frozen=True)
class BlockRecorder:
    """The recorder of one block: knows its index, and full names from those within the block."""

    recorder: Recorder
    block: int
    full_names: dict[str, str]

    @property
    def wanted(self) -> bool:
        """As the recorder behind it."""
        return self.recorder.wanted

    def record(self, phase: str, *, layer: str | None = None, **metrics: Any) -> None:  # noqa: ANN401
        """Pass on with the block and the full name of the layer."""
        full = None if layer is None else self.full_names[layer]
        self.recorder.record(phase, block=self.block, layer=full, **metrics)
