"""From rows of a run to values by layer, by step and by phase."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nanoquant.methods import size_of
from nanoquant.product_budget import ProductShape
from nanoquant.recorder import PHASES
from nanoquant.report.run_files import Run, number

Cell = tuple[int, str]
"""A layer: its block, and its name within the block."""


@dataclass(frozen=True)
class Grid:
    """One value a layer, as a map of kinds over blocks."""

    values: dict[Cell, float]

    @property
    def blocks(self) -> list[int]:
        """Blocks in their order."""
        return sorted({block for block, _ in self.values})

    @property
    def kinds(self) -> list[str]:
        """Names within a block, in the order they came."""
        return list(dict.fromkeys(kind for _, kind in self.values))

    def of_block(self, block: int) -> list[float]:
        """Values of the layers of one block."""
        return [value for (b, _), value in self.values.items() if b == block]

    def of_kind(self, kind: str) -> list[float]:
        """Values of one kind of layer over all blocks."""
        return [value for (_, k), value in self.values.items() if k == kind]

    def table(self, kinds: list[str], blocks: list[int]) -> list[list[float]]:
        """Values (kinds, blocks), NaN where there is none."""
        return [[self.values.get((b, kind), math.nan) for b in blocks] for kind in kinds]


@dataclass
class Curve:
    """Values over steps."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """One more point."""
        self.steps.append(step)
        self.values.append(value)


@dataclass(frozen=True)
class Histogram:
    """Counts of latents between edges (one more than counts)."""

    edges: list[float]
    counts: list[float]


def cell_of(layer: str | None, block: int | None = None) -> Cell | None:
    """The layer as block and name within it; None where no block is known.

    >>> cell_of("model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj')
    """
    if not layer:
        return None
    parts = layer.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return int(part), ".".join(parts[place + 1 :])
    return None if block is None else (block, layer)


def phase_order(phases: Iterable[str]) -> list[str]:
    """Each phase once, known ones first in the order of the method."""
    found = dict.fromkeys(phases)
    return [p for p in PHASES if p in found] + [p for p in found if p not in PHASES]


def layer_grids(run: Run, metric: str) -> dict[str, Grid]:
    """The last value of a metric for each layer, by phase in order; phases without any are absent."""
    found: dict[str, dict[Cell, float]] = defaultdict(dict)
    for row in run.having(metric):
        cell = cell_of(row["layer"], row["block"])
        if cell is not None:
            found[row["phase"]][cell] = float(row[metric])
    return {phase: Grid(found[phase]) for phase in phase_order(found)}


def layer_errors(run: Run) -> dict[str, Grid]:
    """Error of each layer by phase; where no rows tell, that of the initialization from the final figures."""
    grids = layer_grids(run, "error")
    if grids:
        return grids
    blocks = run.get("figures", "report", "blocks")
    values = {}
    for block, report in blocks.items() if isinstance(blocks, dict) else ():
        errors = report.get("weight_error") if isinstance(report, dict) else None
        for layer, value in errors.items() if isinstance(errors, dict) else ():
            if str(block).isdecimal() and number(value) is not None:
                values[int(block), str(layer)] = float(value)
    return {"initialize": Grid(values)} if values else {}


def layer_metric(run: Run, metric: str) -> Grid:
    """The newest value of a metric for each layer, whatever the phase."""
    merged: dict[Cell, float] = {}
    for grid in layer_grids(run, metric).values():
        merged |= grid.values
    return Grid(merged)


def layer_ranks(run: Run) -> Grid:
    """Rank of each layer, from the rows, else from the final figures."""
    grid = layer_metric(run, "rank")
    ranks = run.get("figures", "report", "ranks")
    if grid.values or not isinstance(ranks, dict):
        return grid
    cells = {cell_of(str(name)): number(rank) for name, rank in ranks.items()}
    return Grid({c: rank for c, rank in cells.items() if c is not None and rank is not None})


def layer_codebooks(run: Run) -> dict[Cell, ProductShape]:
    """Codebooks of each layer, from the rows and the final figures; empty where layers have ranks."""
    entries = [(cell_of(row["layer"], row["block"]), row) for row in run.rows if "widths" in row]
    figures = run.get("figures", "report", "ranks")
    for name, entry in figures.items() if isinstance(figures, dict) else ():
        if isinstance(entry, dict) and "widths" in entry:
            entries.append((cell_of(str(name)), entry))
    return {cell: size_of(entry) for cell, entry in entries if cell is not None}


def curves(run: Run, metric: str, phase: str) -> dict[str, Curve]:
    """Values over steps in one phase, a curve for each block and layer that rows name ("" for none)."""
    found: dict[str, Curve] = {}
    for row in run.having(metric, phase):
        name = "" if row["block"] is None else f"block {row['block']}"
        curve = found.setdefault(name, Curve())
        curve.add(len(curve.steps) if row["step"] is None else row["step"], float(row[metric]))
    return found


def model_losses(run: Run) -> tuple[Curve, Curve]:
    """Training loss and held-out divergence of the model phase, from the rows, else from the final figures."""
    train, held = (curves(run, m, "model").get("", Curve()) for m in ("loss", "held_out"))
    report = run.get("figures", "report", "model")
    if isinstance(report, dict) and not train.values and isinstance(report.get("losses"), list):
        for step, value in enumerate(report["losses"]):
            if number(value) is not None:
                train.add(step, float(value))
    if isinstance(report, dict) and not held.values and isinstance(report.get("held_out"), dict):
        for step, value in report["held_out"].items():
            if str(step).isdecimal() and number(value) is not None:
                held.add(int(step), float(value))
    return train, held


def latent_histograms(run: Run) -> dict[str, dict[str, Histogram]]:
    """Histograms by layer, then by phase and step in the order of the run; damaged ones are left out."""
    found: dict[str, dict[str, Histogram]] = defaultdict(dict)
    for row in run.rows:
        edges, counts = (_numbers(row.get(key)) for key in ("latent_edges", "latent_counts"))
        if len(edges) < 2 or len(counts) != len(edges) - 1 or edges != sorted(set(edges)):
            continue
        when = row["phase"] if row["step"] is None else f"{row['phase']}, step {row['step']}"
        found[row["layer"] or "all layers"][when] = Histogram(edges, counts)
    return dict(found)


def _numbers(values: Any) -> list[float]:  # noqa: ANN401
    """The list as finite numbers; empty where it is none."""
    if not isinstance(values, list) or any(number(value) is None for value in values):
        return []
    return [float(value) for value in values]


def block_seconds(run: Run) -> dict[int, float]:
    """Seconds that each block took."""
    rows = run.having("seconds", "block")
    return {row["block"]: float(row["seconds"]) for row in rows if row["block"] is not None}


def phase_seconds(run: Run) -> dict[str, float]:
    """Seconds of each phase as run.json lists them, in its order."""
    return _named_numbers(run.get("seconds")) or _named_numbers(run.get("figures", "seconds"))


def phase_memory(run: Run) -> dict[str, float]:
    """Most bytes in each phase as run.json lists them, else as the rows tell."""
    found = _named_numbers(run.get("memory_bytes"))
    if found:
        return found
    rows = list(run.having("memory_bytes"))
    return {
        phase: max(float(row["memory_bytes"]) for row in rows if row["phase"] == phase)
        for phase in phase_order(row["phase"] for row in rows)
    }


def _named_numbers(values: Any) -> dict[str, float]:  # noqa: ANN401
    """The finite numbers of an object; empty where it is none."""
    items = values.items() if isinstance(values, dict) else ()
    return {str(name): float(value) for name, value in items if number(value) is not None}


def measured(run: Run, who: str, key: str) -> float | None:
    """A figure of the "dense" or "quantized" model: the final one, else the last that a row tells."""
    found = run.number("figures", who, key)
    rows = [row for row in run.having(key, "evaluate") if row.get("model") == who]
    return float(rows[-1][key]) if found is None and rows else found
