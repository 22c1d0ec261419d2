"""Sections over layers: error before and after each phase, and the rank or codebooks each layer got."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from nanoquant.methods import sizes_summary
from nanoquant.product_budget import ProductShape
from nanoquant.report.content import Plot, Section, Table, figure, short
from nanoquant.report.measures import (
    Cell,
    Grid,
    layer_codebooks,
    layer_errors,
    layer_metric,
    layer_ranks,
)
from nanoquant.report.run_files import Run
from nanoquant.report.style import MARKERS, Theme, heat_map, plot, whole_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AFTER = {
    "initialize": "after initialization",
    "block": "after block tuning",
    "model": "after model reconstruction",
}
MOST_NUMBERS = 400
"""Cells of a heat map up to which each shows its number."""
PANEL, ROW = 0.75, 0.24
"""Inches of a heat map's title and axis, and of one of its rows."""


def error_section(run: Run) -> Section:
    """Error per layer as a map for each phase, and per block as a curve for each phase."""
    section = Section("errors", "Error of each layer and block")
    grids = layer_errors(run)
    if not grids:
        section.missing.append(
            "No line of metrics.jsonl has an error of a layer: no layer was initialized before the run ended, "
            "or the metrics are missing."
        )
        return section
    section.items += [_error_maps(grids), _error_curves(grids), _error_table(grids)]
    why = "its settings leave that phase out"
    if run.status != "finished":
        why = f"it did not get there, or {why}"
    section.missing += [
        f"No errors {AFTER[phase]}: the run recorded none; {why}."
        for phase in AFTER
        if phase not in grids
    ]
    return section


def _name(phase: str) -> str:
    return AFTER.get(phase, f"after {short(phase)}")


def _error_maps(grids: dict[str, Grid]) -> Plot:
    """One map for each phase, all on one scale."""
    kinds = list(dict.fromkeys(kind for grid in grids.values() for kind in grid.kinds))
    blocks = sorted({block for grid in grids.values() for block in grid.blocks})
    top = max(value for grid in grids.values() for value in grid.values.values())

    def draw(canvas: Figure, theme: Theme) -> None:
        panels = canvas.subplots(len(grids), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (phase, grid) in zip(panels, grids.items(), strict=True):
            values = grid.table(kinds, blocks)
            image = heat_map(axes, theme, values, [short(k, 28) for k in kinds], blocks, top)
            axes.set_title(_name(phase))
        panels[-1].set_xlabel("decoder block")
        canvas.colorbar(image, ax=list(panels), label="relative squared error", pad=0.01)

    worst = {
        phase: max(grid.values, key=lambda cell: grid.values[cell]) for phase, grid in grids.items()
    }
    said = "; ".join(
        f"{_name(phase)} the largest is {grids[phase].values[cell]:.3g}, in block {cell[0]}, {short(cell[1])}"
        for phase, cell in worst.items()
    )
    caption = (
        "Share of each layer's weighted energy that its quantized form misses: 0 is exact, 1 is as wrong as "
        f"leaving the layer out. Bright cells lose most; rows that stay bright across all blocks are kinds of "
        f"layers that want more bits. Here {said}. Cells without a value are blank."
    )
    alt = f"Heat map of errors, {len(kinds)} kinds of layers by {len(blocks)} blocks: {said}."
    height = len(grids) * (PANEL + ROW * len(kinds)) + 0.4
    return plot("layer_errors", height, draw, caption, alt)


def _error_curves(grids: dict[str, Grid]) -> Plot:
    """Mean error over blocks, a curve a phase, and the worst layer of each block."""
    ends = [block for grid in grids.values() for block in grid.blocks]
    first, last = min(ends), max(ends)

    base = next(iter(grids.values()))
    changed = {phase: _change(base, grid) for phase, grid in list(grids.items())[1:]}

    def draw(canvas: Figure, theme: Theme) -> None:
        ratios = {"height_ratios": [2, 1][: 1 + bool(changed)]}
        panels = canvas.subplots(
            1 + bool(changed), 1, squeeze=False, sharex=True, gridspec_kw=ratios
        )[:, 0]
        for place, (phase, grid) in enumerate(grids.items()):
            color = theme.lines[place % len(theme.lines)]
            style = {"color": color, "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
            per_block = [grid.of_block(block) for block in grid.blocks]
            means = [statistics.fmean(values) for values in per_block]
            worst = [max(values) for values in per_block]
            panels[0].plot(grid.blocks, means, label=_name(phase), **style)
            panels[0].plot(grid.blocks, worst, linestyle=":", linewidth=1.2, color=color)
            if phase in changed:
                panels[1].plot(list(changed[phase]), list(changed[phase].values()), **style)
                panels[1].axhline(0, color=theme.ink, linewidth=0.8)
                panels[1].set_ylabel("change")
        panels[0].set(ylabel="relative squared error", ylim=(0, None))
        panels[-1].set(xlabel="decoder block", xlim=(first - 0.5, last + 0.5))
        whole_ticks(panels[-1].xaxis)
        canvas.legend(loc="outside upper left", ncols=len(grids))

    said = ", ".join(
        f"{statistics.fmean(grid.values.values()):.3g} {_name(phase)}"
        for phase, grid in grids.items()
    )
    caption = (
        "Mean error of the layers of each block (solid), and that of its worst layer (dotted); below, the change "
        "of the mean since the first of these phases. A later phase should lie below an earlier one where it "
        "minimizes this error; a phase that trains "
        f"against outputs may raise it and still improve the model. Mean over all layers: {said}."
    )
    return plot(
        "block_errors",
        4.4 if changed else 3.2,
        draw,
        caption,
        f"Mean error over blocks, a line a phase: {said}.",
    )


def _change(base: Grid, grid: Grid) -> dict[int, float]:
    """Mean change of each block's layers from one phase to another, over layers that both know."""
    found = {}
    for block in grid.blocks:
        cells = [cell for cell in grid.values if cell[0] == block and cell in base.values]
        if cells:
            found[block] = statistics.fmean(grid.values[c] - base.values[c] for c in cells)
    return found


def _error_table(grids: dict[str, Grid]) -> Table:
    """Mean error of each kind of layer, a column a phase."""
    kinds = list(dict.fromkeys(kind for grid in grids.values() for kind in grid.kinds))
    rows = []
    for kind in kinds:
        values = [grid.of_kind(kind) for grid in grids.values()]
        rows.append([kind, *(figure(statistics.fmean(v) if v else None, ".3f") for v in values)])
    return Table(
        "Mean error of each kind of layer over all blocks.", ["layer", *map(_name, grids)], rows
    )


def rank_section(run: Run) -> Section:
    """Rank of each layer, or its codebooks, and its bits per weight where the rows tell."""
    ranks, bits = layer_ranks(run), layer_metric(run, "bits")
    if books := layer_codebooks(run):
        return _codebook_section(books, bits)
    section = Section("ranks", "Rank of each layer")
    if not ranks.values:
        section.missing.append(
            "No ranks or codebooks: neither metrics.jsonl nor the figures of run.json name any."
        )
        return section
    kinds, blocks = ranks.kinds, ranks.blocks
    table = ranks.table(kinds, blocks)

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        top = max(ranks.values.values())
        image = heat_map(axes, theme, table, [short(k, 28) for k in kinds], blocks, top)
        axes.set_xlabel("decoder block")
        canvas.colorbar(image, ax=axes, label="rank", pad=0.01)
        if len(kinds) * len(blocks) <= MOST_NUMBERS:
            _write_numbers(axes, table, top)

    least, most = (pick(ranks.values, key=lambda cell: ranks.values[cell]) for pick in (min, max))
    said = (
        f"from {ranks.values[least]:g} (block {least[0]}, {short(least[1])}) "
        f"to {ranks.values[most]:g} (block {most[0]}, {short(most[1])})"
    )
    spent = ""
    if bits.values:
        low, high = min(bits.values.values()), max(bits.values.values())
        spent = f" Layers take {low:.4f} to {high:.4f} bits per weight, scales counted."
    caption = (
        f"Rank of the binary factors of each layer, {said}. Within a row, shapes are equal, so a change along it "
        f"is bits moved between blocks; between rows, larger matrices take larger ranks for the same bits.{spent}"
    )
    alt = f"Heat map of ranks, {len(kinds)} kinds of layers by {len(blocks)} blocks, {said}."
    section.items.append(plot("ranks", PANEL + ROW * len(kinds) + 0.3, draw, caption, alt))
    return section


def _codebook_section(books: dict[Cell, ProductShape], bits: Grid) -> Section:
    """Codebooks of each kind of layer, how often each comes, and the mean of its bits per weight."""
    section, kinds = Section("ranks", "Codebooks of each layer"), {}
    for (_, kind), shape in books.items():
        kinds.setdefault(kind, []).append(shape)
    rows = []
    for kind, shapes in kinds.items():
        spent = bits.of_kind(kind)
        mean = figure(statistics.fmean(spent) if spent else None, ".4f")
        rows.append([kind, sizes_summary(shapes)["codebooks"], mean])
    caption = (
        "Group of inputs that share an index, bits of the index of each codebook, and ranges of rows with codebooks "
        "of their own (8:8+4 x2); in parentheses how many layers have them. Bits are means over all blocks, codebooks "
        "and scales counted."
    )
    section.items.append(Table(caption, ["layer", "codebooks", "bits per weight"], rows))
    return section


def _write_numbers(axes: object, table: list[list[float]], top: float) -> None:
    """Write each value into its cell, dark on bright and bright on dark."""
    size = 7.5 if len(table[0]) <= 24 else 6
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if not math.isnan(value):
                ink = "#111111" if value > 0.55 * top else "#ffffff"
                axes.text(x, y, f"{value:g}", ha="center", va="center", size=size, color=ink)
