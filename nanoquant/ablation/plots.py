"""Plots of an ablation: the excess over each axis, and the error that each phase leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoquant.ablation.plan import SEED
from nanoquant.ablation.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 10
"""Lines of one plot; more could not be told apart."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_plots(folder: Path, rows: list[Row], records: list[dict[str, Any]]) -> list[Path]:
    """``excess_AXIS.png`` for each axis with two or more choices, and ``errors.png``."""
    finished = [row for row in rows if row.values["excess"] is not None]
    if not finished:
        return []
    files = []
    for axis in finished[0].choices:
        if len({row.choices[axis] for row in finished}) > 1:
            files.append(folder / f"excess_{axis.replace('.', '_').replace('/', '_')}.png")
            _save(files[-1], lambda axes, axis=axis: _over(axes, axis, finished))
    files.append(folder / "errors.png")
    _save(files[-1], lambda axes: _errors(axes, records))
    return files


def _save(file: Path, draw: Any) -> None:  # noqa: ANN401
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    figure.savefig(file, dpi=120)


def _over(axes: Axes, axis: str, rows: list[Row]) -> None:
    """Excess over one axis, a line for every choice on the others; bars of the spread over seeds."""
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        others = ", ".join(f"{k} {v}" for k, v in row.choices.items() if k != axis)
        lines.setdefault(others, {})[row.choices[axis]] = row
    labels = list(dict.fromkeys(row.choices[axis] for row in rows))
    places = _numbers(labels) or list(range(len(labels)))
    if any(
        len(members) > 1 for members in lines.values()
    ):  # a lone point shows nothing of this axis
        lines = {name: members for name, members in lines.items() if len(members) > 1}
    for name, members in list(lines.items())[:MOST_LINES]:
        at = sorted((places[labels.index(label)], row) for label, row in members.items())
        axes.errorbar(
            [place for place, _ in at],
            [row.values["excess"] for _, row in at],
            yerr=[row.values["spread"] or 0.0 for _, row in at],
            marker="o",
            capsize=3,
            label=name or None,
        )
    if len(lines) > MOST_LINES:
        axes.set_title(f"{MOST_LINES} of {len(lines)} combinations")
    if _numbers(labels) is None:
        axes.set_xticks(places, labels)
    if len(lines) > 1:
        axes.legend(fontsize="small")
    axes.set(xlabel=axis, ylabel="excess, nats a token", ylim=(0, None))
    axes.grid(alpha=0.3)


def _numbers(labels: list[str]) -> list[float] | None:
    """The labels as numbers; None where one is none."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return None


def _errors(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Weight error after each phase, a line for every cell that is finished."""
    phases = ["initialize", "block", "model"]
    done = [record for record in records if record["status"] == "finished"]
    for record in done[:MOST_LINES]:
        name = ", ".join(f"{k} {v}" for k, v in record["choices"].items() if k != SEED)
        errors = record["errors"]
        places = [phases.index(phase) for phase in errors]  # a phase may be missing
        axes.plot(places, list(errors.values()), marker="o", label=name)
    if len(done) > MOST_LINES:
        axes.set_title(f"{MOST_LINES} of {len(done)} cells")
    axes.set_xticks(range(len(phases)), phases)
    axes.set(ylabel="weighted relative squared error", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
