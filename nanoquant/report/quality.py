"""Sections on what came out: perplexity against bytes, and texts of both models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoquant.baselines.report import RUINED, pareto_front
from nanoquant.report.content import Plot, Section, Table, Texts, short
from nanoquant.report.evaluations import Point, own_points, record_points
from nanoquant.report.run_files import Run
from nanoquant.report.style import MARKERS, Theme, log_axis, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 4
"""Points of a panel up to which each is named beside it; more are explained by a legend."""


def perplexity_section(run: Run, records: list[str]) -> Section:
    """Perplexity against bytes, a panel for each protocol."""
    section = Section("perplexity", "Perplexity against bytes")
    beside, problems = record_points(run, records)
    points = list(dict.fromkeys([*own_points(run), *beside]))
    section.missing += problems
    if not points:
        section.missing.append(
            "No perplexities: the run measured none before it ended (--eval-text asks for them), and no evaluation "
            "record of its models lies beside it."
        )
        return section
    protocols = list(dict.fromkeys(point.protocol for point in points))
    section.items += [_plot(points, protocols), _table(points)]
    return section


def _plot(points: list[Point], protocols: list[str]) -> Plot:
    """Panels under each other, each with the front of what nothing smaller beats."""
    methods = list(dict.fromkeys(point.method for point in points))
    panels_of = {p: drawn([point for point in points if point.protocol == p]) for p in protocols}
    crowded = max(map(len, panels_of.values())) > MOST_NAMED

    def draw(canvas: Figure, theme: Theme) -> None:
        panels = canvas.subplots(len(protocols), 1, squeeze=False)[:, 0]
        handles = {}
        for axes, (protocol, own) in zip(panels, panels_of.items(), strict=True):
            best = front(own)
            x, y = [p.bytes / 1e6 for p in best], [p.perplexity for p in best]
            axes.plot(x, y, color=theme.faint, linewidth=3, zorder=1)
            for point in own:
                place = methods.index(point.method)
                color = theme.lines[place % len(theme.lines)]
                marker = MARKERS[place % len(MARKERS)]
                where = point.bytes / 1e6, point.perplexity
                (handles[point.method],) = axes.plot(*where, marker, color=color, markersize=7.5)
                if not crowded:
                    text = f"{short(point.name, 44)}: {point.perplexity:.4g}"
                    axes.annotate(text, where, (8, 5), textcoords="offset points", size=9)
            axes.set_title(short(protocol, 80))
            axes.set(ylabel="perplexity", xlabel="bytes of the weight files, MB")
            axes.set_xlim(0, (1.05 if crowded else 1.35) * max(p.bytes for p in own) / 1e6)
            values = [point.perplexity for point in own]
            log_axis(axes, min(values) / 1.6, max(values) * 1.8)
        if crowded:
            names = [short(method, 28) for method in handles]
            canvas.legend(handles.values(), names, loc="outside right upper")

    hidden = [p for p in points if p not in panels_of[p.protocol]]
    best = min(points, key=lambda point: point.perplexity)
    least = min(points, key=lambda point: point.bytes)
    said = (
        f"lowest perplexity {best.perplexity:.4g}, {short(best.name)}; "
        f"fewest bytes {least.bytes / 1e6:.4g} MB, {short(least.name)}"
    )
    caption = (
        f"Down and to the left is better ({said}). The line joins the models that no smaller one beats. Bytes are "
        "those of the whole files, or of all tensors where a baseline was never written, embedding and head included. "
        "Compare within a panel only: each has its own text and windows."
    )
    if hidden:
        named = ", ".join(f"{short(p.name, 44)} {p.perplexity:.2g}" for p in hidden)
        caption += f" Not drawn, above {RUINED:g} times the best of their panel: {named}."
    height = 0.3 + 3.0 * len(protocols)
    return plot("perplexity", height, draw, caption, f"Perplexity against bytes: {said}.")


def drawn(points: list[Point]) -> list[Point]:
    """The points of a panel that are of use; ruined models would squeeze all others together."""
    best = min(point.perplexity for point in points)
    return [point for point in points if point.perplexity <= RUINED * best]


def front(points: list[Point]) -> list[Point]:
    """The points that no smaller or equally large one beats, from small to large."""
    return [points[index] for index in pareto_front([(p.bytes, p.perplexity) for p in points])]


def _table(points: list[Point]) -> Table:
    rows = [
        [short(p.protocol, 60), short(p.name), f"{p.bytes:,.0f}", f"{p.perplexity:.4f}"]
        for p in sorted(points, key=lambda p: (p.protocol, p.bytes))
    ]
    return Table("The same as figures.", ["protocol", "model", "bytes", "perplexity"], rows)


def sample_section(run: Run) -> Section:
    """Continuations of one prompt by the dense and the quantized model."""
    section = Section("samples", "Continuations side by side")
    texts = {who: run.text("figures", who, "sample") for who in ("dense", "quantized")}
    prompt = run.text("figures", "job", "sample") or run.text("job", "sample")
    columns = [(who, text) for who, text in texts.items() if text is not None]
    if columns:
        asked = "an unknown prompt" if prompt is None else f'"{prompt}"'
        section.items.append(Texts(f"Greedy continuations of {asked}.", columns))
    for who, text in texts.items():
        if text is None:
            why = "no prompt was given (--sample)" if prompt is None else "the run ended before"
            section.missing.append(f"No continuation by the {who} model: {why}.")
    return section
