"""Records of evaluations as one table in true bits, and as one Pareto plot in bytes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanoquant.baselines.records import Row, rows_of
from nanoquant.benchmark.report import number
from nanoquant.console import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (9, 6)
"""Of the plot, inches."""
RUINED = 100.0
"""Times the best perplexity above which a model is named, not drawn: it would flatten all others."""
TITLE_WIDTH = 120
"""Characters."""


def records_table(records: Sequence[dict[str, Any]]) -> str:
    """One line a record, in the order given; a column for each protocol that any of them has."""
    rows = rows_of(records)
    texts, divergences = (_names(row.perplexity for row in rows), _names(row.kl for row in rows))
    header = ["method", "body bits", "model bits", "MB"]
    header += [f"perplexity {name}" for name in texts] + [f"KL {name}" for name in divergences]
    scored = any(row.accuracy is not None for row in rows)
    header += ["zero-shot", "+-"] if scored else []
    lines = []
    for row in rows:
        line = [row.name, number(row.body_bits, ".4f"), f"{row.model_bits:.4f}"]
        line += [f"{row.bytes / 1e6:.1f}"]
        line += [_short(row.perplexity.get(name)) for name in texts]
        line += [number(row.kl.get(name), ".4f") for name in divergences]
        line += _accuracy(row) if scored else []
        lines.append(line)
    return table(lines, header)


def _accuracy(row: Row) -> list[str]:
    """Mean accuracy and its standard error in percent."""
    keys = ("acc", "acc_stderr")
    return ["-", "-"] if row.accuracy is None else [f"{100 * row.accuracy[k]:.1f}" for k in keys]


def _names(figures: Any) -> list[str]:  # noqa: ANN401
    """Names of protocols, each once, in order."""
    return list(dict.fromkeys(name for one in figures for name in one))


def _short(perplexity: float | None) -> str:
    """Four digits; the perplexity of a ruined model as a power of ten."""
    if perplexity is None:
        return "-"
    return f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other one beats in both, by rising cost."""
    front, best = [], math.inf
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front


def check_plottable(records: Sequence[dict[str, Any]]) -> None:
    """Refuse a plot without a perplexity to draw.

    Raises:
        ValueError: no record has one.
    """
    if not any(row.perplexity for row in rows_of(records)):
        raise ValueError("--plot draws perplexity against bytes, and no record has a perplexity")


def plot_pareto(records: Sequence[dict[str, Any]], file: str) -> None:
    """Draw perplexity over bytes of the stored tensors, a panel for each protocol, with the Pareto front.

    Args:
        records: of one model or several, measured in the same way.
        file: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = rows_of(records)
    names = _names(row.perplexity for row in rows)
    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        draw_panel(axes, name, [row for row in rows if name in row.perplexity])
    figure.savefig(file, format="png")


def draw_panel(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    """Points of one protocol, their names, and the front; models that are ruined are only named."""
    best = min((row.perplexity[name] for row in rows), default=1.0)
    usable = [row for row in rows if row.perplexity[name] <= RUINED * best]
    points = [(row.bytes / 1e6, row.perplexity[name]) for row in usable]
    front = pareto_front(points)
    order = sorted(range(len(points)), key=points.__getitem__)
    for place, index in enumerate(order):
        row, point = usable[index], points[index]
        colour = "tab:blue" if index in front else "tab:gray"
        axes.plot(*point, "*" if row.name.startswith("nanoquant ") else "o", color=colour)
        # neighbours in bytes are often neighbours in perplexity: names on both sides in turns
        offset, side = (((5, 5), "left"), ((-5, -12), "right"))[place % 2]
        axes.annotate(
            row.name, point, offset, textcoords="offset points", fontsize="small", ha=side
        )
    if front:
        line = [points[index] for index in front]
        axes.plot(*zip(*line, strict=True), "-", color="tab:blue", alpha=0.5, label="Pareto front")
        axes.legend()
    ruined = [f"{row.name} {_short(row.perplexity[name])}" for row in rows if row not in usable]
    if ruined:
        text = f"not drawn, above {RUINED:g} times the best: {', '.join(ruined)}"
        axes.set_title(textwrap.fill(text, TITLE_WIDTH), fontsize="small")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("stored bytes of the whole model, MB")
    axes.set_ylabel(f"perplexity, {name}")
    for axis in (axes.xaxis, axes.yaxis):  # powers of ten alone say too little
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(True, alpha=0.3, which="both")
