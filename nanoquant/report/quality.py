"""Sections on what came out: perplexity against bytes, and texts of both models side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoquant.report.content import Plot, Section, Table, Texts, short
from nanoquant.report.evaluations import Point, own_points, record_points
from nanoquant.report.record import Run
from nanoquant.report.style import MARKERS, Theme, log_axis, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 12
"""Points of a panel up to which each is named."""


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
    """Panels under each other; smaller and lower is better."""
    methods = list(dict.fromkeys(point.method for point in points))

    def draw(canvas: Figure, theme: Theme) -> None:
        panels = canvas.subplots(len(protocols), 1, squeeze=False)[:, 0]
        for axes, protocol in zip(panels, protocols, strict=True):
            own = [point for point in points if point.protocol == protocol]
            for point in own:
                place = methods.index(point.method)
                color = theme.lines[place % len(theme.lines)]
                marker = MARKERS[place % len(MARKERS)]
                axes.plot(point.bytes / 1e6, point.perplexity, marker, color=color, markersize=8)
                if len(own) <= MOST_NAMED:
                    text = f"{short(point.name, 44)}: {point.perplexity:.4g}"
                    where = {"xytext": (8, 5), "textcoords": "offset points", "size": 9}
                    axes.annotate(text, (point.bytes / 1e6, point.perplexity), **where)
            axes.set_title(short(protocol, 80))
            axes.set(ylabel="perplexity", xlabel="bytes of the weight files, MB")
            axes.set_xlim(0, 1.35 * max(point.bytes for point in own) / 1e6)
            values = [point.perplexity for point in own]
            log_axis(axes, min(values) / 1.6, max(values) * 1.8)

    best = min(points, key=lambda point: point.perplexity)
    least = min(points, key=lambda point: point.bytes)
    said = (
        f"lowest perplexity {best.perplexity:.4g}, {short(best.name)}; "
        f"fewest bytes {least.bytes / 1e6:.4g} MB, {short(least.name)}"
    )
    caption = (
        f"Down and to the left is better ({said}). Bytes are those of the whole files, embedding and head included, so "
        "methods compare at what they really take. Compare within a panel only: each has its own text and windows."
    )
    height = 0.3 + 3.0 * len(protocols)
    return plot("perplexity", height, draw, caption, f"Perplexity against bytes: {said}.")


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
