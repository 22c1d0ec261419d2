"""How records become named series: which name, over which axis. Shared by every logger.

    model/loss, model/held_out, model/rate, model/flips     over model/step
    block_03/loss, block_03/error                           over block_03/step
    blocks/error, blocks/worst_error, blocks/seconds,       over blocks/block, which is the depth
    blocks/error_after_model

Single layers stay out of the series, of which there would be hundreds: they are rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

KEYS = ("t", "phase", "block", "layer", "step")
"""Keys of a record that are no metrics."""
LAYER_COLUMNS = (
    "layer block rank bits weights initialize_error block_error model_error drift"
).split()


@dataclass(frozen=True)
class Point:
    """Values by name at one place of an axis."""

    values: dict[str, float]
    axis: str
    at: int


@dataclass
class Layout:
    """Turns records into points, and keeps what is known of every layer."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    last_step: dict[int, int] = field(default_factory=dict)

    def points(self, record: dict[str, Any]) -> Iterator[Point]:
        """Points of one record, in the order in which they are to be logged."""
        numbers = {
            name: float(value)
            for name, value in record.items()
            if name not in KEYS and isinstance(value, int | float)
        }
        block, layer, step = (record.get(key) for key in ("block", "layer", "step"))
        if layer is not None:
            self._keep(layer, record, numbers)
        elif block is not None and step is not None:
            self.last_step[block] = step
            yield _series(f"block_{block:02d}", numbers, "step", step)
        elif block is not None:
            yield from self._end_of_block(block, numbers)
        elif step is not None:
            yield _series(record["phase"], numbers, "step", step)

    def after_model(self) -> Iterator[Point]:
        """Errors by depth after the whole model was trained."""
        for block in sorted({row["block"] for row in self.layers.values()}):
            if means := self._errors(self._block(block), "model_error"):
                yield _series("blocks", {"error_after_model": means[0]}, "block", block)

    def mean_error(self, phase: str) -> float | None:
        """Mean error over the weights of all layers after a phase; None where no layer has one."""
        found = self._errors(self.layers.values(), f"{phase}_error")
        return None if found is None else found[0]

    def rows(self) -> list[list[Any]]:
        """The layers as rows of ``LAYER_COLUMNS``; None for what was not measured."""
        return [
            [name, *(row.get(column) for column in LAYER_COLUMNS[1:])]
            for name, row in self.layers.items()
        ]

    def _keep(self, layer: str, record: dict[str, Any], numbers: dict[str, float]) -> None:
        if record.get("block") is None:
            return  # latents, which are no column
        row = self.layers.setdefault(layer, {"block": record["block"]})
        row |= {name: numbers[name] for name in LAYER_COLUMNS if name in numbers}
        if "error" in numbers:
            row[f"{record['phase']}_error"] = numbers["error"]

    def _end_of_block(self, block: int, numbers: dict[str, float]) -> Iterator[Point]:
        rows = self._block(block)
        start, end = self._errors(rows, "initialize_error"), self._errors(rows, "block_error")
        last = self.last_step.get(block, 0)
        for step, errors in ((0, start), (last, end)):
            if errors:
                yield _series(f"block_{block:02d}", {"error": errors[0]}, "step", step)
        if errors := end or start:
            numbers |= {"error": errors[0], "worst_error": errors[1]}
        yield _series("blocks", numbers, "block", block)

    def _block(self, block: int) -> list[dict[str, Any]]:
        return [row for row in self.layers.values() if row["block"] == block]

    @staticmethod
    def _errors(layers: Iterable[dict[str, Any]], column: str) -> tuple[float, float] | None:
        """Mean over the weights, and largest, of the layers that have this error."""
        rows = [row for row in layers if column in row]
        if not rows:
            return None
        weights = [row.get("weights", 1.0) for row in rows]
        total = sum(w * row[column] for w, row in zip(weights, rows, strict=True))
        return total / sum(weights), max(row[column] for row in rows)


def _series(group: str, values: dict[str, float], axis: str, at: int) -> Point:
    return Point(
        {f"{group}/{name}": value for name, value in values.items()}, f"{group}/{axis}", at
    )
