"""Sections over steps: losses and rates of training, flips of signs, and where the latents lie."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from nanoquant.report.content import Plot, Section, short
from nanoquant.report.measures import (
    Curve,
    Histogram,
    curves,
    latent_histograms,
    model_losses,
)
from nanoquant.report.run_files import Run
from nanoquant.report.style import MARKERS, Theme, depth_colour, log_axis, plot, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLIPS = {"flips": "since the last record", "flips_since_start": "since the start of training"}
MOST_PANELS, MOST_OUTLINES = 4, 3
"""Layers whose histograms are shown, and histograms of each."""


def loss_section(run: Run) -> Section:
    """Training and held-out loss and the rate of the model phase, and the losses of the blocks."""
    section = Section("losses", "Losses")
    train, held = model_losses(run)
    if train.values or held.values:
        rates = curves(run, "rate", "model").get("", Curve())
        hard = run.number("config", "model", "hard_labels") or 0.0
        section.items.append(_model_losses(train, held, rates, hard))
    else:
        section.missing.append(
            "No losses of the whole model: its phase did not begin, or the settings leave it out."
        )
    if (train.values or held.values) and not held.values:
        section.missing.append("No held-out loss: none was measured before the run ended.")
    blocks = curves(run, "loss", "block")
    if blocks:
        section.items.append(_block_losses(blocks))
    else:
        section.missing.append(
            "No losses of blocks: the settings leave block tuning out, or it did not begin."
        )
    return section


def _model_losses(train: Curve, held: Curve, rates: Curve, hard: float) -> Plot:
    """Divergence over steps, in training with a share of hard labels, and the rate under it where it is known."""

    def draw(canvas: Figure, theme: Theme) -> None:
        ratios = {"height_ratios": [3, 1]} if rates.values else {}
        panels = canvas.subplots(
            1 + bool(rates.values), 1, squeeze=False, sharex=True, gridspec_kw=ratios
        )[:, 0]
        top, bottom = panels[0], panels[-1]
        if train.values:
            color = theme.lines[0]
            top.plot(train.steps, train.values, color=color, alpha=0.3, linewidth=0.8)
            top.plot(train.steps, _smooth(train.values), color=color, label="training, smoothed")
        if held.values:
            style = {"color": theme.lines[1], "marker": "o", "label": "held out"}
            top.plot(held.steps, held.values, **style)
        top.set_ylabel("nats a token" if hard else "KL divergence, nats a token")
        _log_if_positive(top, [*train.values, *held.values])
        top.legend()
        if rates.values:
            bottom.plot(rates.steps, rates.values, color=theme.lines[2])
            bottom.set_ylabel("learning rate")
        bottom.set_xlabel("optimizer step")
        whole_ticks(bottom.xaxis)

    said = []
    if train.values:
        said.append(f"training goes from {train.values[0]:.3g} to {_smooth(train.values)[-1]:.3g}")
    if held.values:
        best = min(range(len(held.values)), key=lambda i: held.values[i])
        said.append(
            f"held-out windows are best at step {held.steps[best]:g} with {held.values[best]:.4g}"
        )
    what = "; ".join(said)
    turn = "a held-out curve that turns up while training falls is overfitting."
    if hard:
        turn = f"in training the text's own next tokens have {hard:g} of the target, so the curves do not compare."
    caption = (
        f"Divergence of the quantized model from the dense one over the steps of the last phase: {what}. "
        f"The state of the best held-out point is the one that is kept; {turn}"
    )
    return plot("model_loss", 4.2 if rates.values else 3.4, draw, caption, f"Loss curves: {what}.")


def _log_if_positive(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis around the values where they are all above 0."""
    if min(values) > 0:
        log_axis(axes, min(values) / 1.1, max(values) * 1.1)


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values, unbiased at the start."""
    keep = 1 - 1 / max(1, len(values) // 20)
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _block_losses(blocks: dict[str, Curve]) -> Plot:
    """Losses of the blocks, shallow to deep."""

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        for place, (name, curve) in enumerate(blocks.items()):
            color = depth_colour(theme, place, len(blocks))
            axes.plot(curve.steps, curve.values, color=color, linewidth=1, label=name or "all")
        axes.set(xlabel="optimizer step within the block", ylabel="loss, relative squared error")
        _log_if_positive(axes, [value for curve in blocks.values() for value in curve.values])
        whole_ticks(axes.xaxis)
        canvas.legend(*_ends(*axes.get_legend_handles_labels()), loc="outside upper left", ncols=4)

    ends = [(name, c.values[0], c.values[-1]) for name, c in blocks.items()]
    worst = max(ends, key=lambda end: end[2])
    said = f"{len(blocks)} blocks; the largest last loss is {worst[2]:.3g}, of {worst[0] or 'all'}"
    caption = (
        f"Loss at the output of each block while it is tuned ({said}). One line a block, from shallow to deep; a "
        "jump up is where the next layer was quantized, and the fall after it is what tuning wins back."
    )
    return plot("block_loss", 3.6, draw, caption, f"Losses of blocks over steps: {said}.")


def _ends(handles: list[Any], labels: list[str]) -> tuple[list[Any], list[str]]:
    """Legend entries of the first, the middle and the last of many lines."""
    if len(labels) <= 8:
        return handles, labels
    kept = sorted({0, len(labels) // 2, len(labels) - 1})
    return [handles[i] for i in kept], [labels[i] for i in kept]


def sign_section(run: Run) -> Section:
    """Flips of signs over steps, and histograms of the latents behind them."""
    section = Section("signs", "Signs and the latents behind them")
    flips = {metric: curves(run, metric, "model").get("", Curve()) for metric in FLIPS}
    flips = {metric: curve for metric, curve in flips.items() if curve.values}
    if flips:
        section.items.append(_flips(flips))
    else:
        section.missing.append(
            "No flips of signs: none were trained, or the run ended before they were counted."
        )
    histograms = latent_histograms(run)
    if histograms:
        section.items.append(_latents(histograms))
    else:
        section.missing.append(
            "No histograms of latents: no signs were trained, or the run ended before."
        )
    return section


def _flips(flips: dict[str, Curve]) -> Plot:
    """Shares of flipped signs over steps."""

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        for (metric, curve), marker in zip(flips.items(), MARKERS, strict=False):
            shares = [100 * value for value in curve.values]
            axes.plot(curve.steps, shares, marker=marker, markersize=5, label=FLIPS[metric])
        axes.set(xlabel="optimizer step", ylabel="signs flipped, %", ylim=(0, None))
        whole_ticks(axes.xaxis)
        axes.legend()

    said = "; ".join(
        f"{FLIPS[metric]}, {100 * curve.values[-1]:.2g} % at step {curve.steps[-1]:g}"
        for metric, curve in flips.items()
    )
    caption = (
        f"Share of all signs that changed, {said}. Counts between records that fall to zero mean that the signs "
        "have settled; ones that stay high at the end want a lower rate or more steps; zero from the start means that "
        "the rate is too small to move a sign."
    )
    return plot("sign_flips", 3.2, draw, caption, f"Share of flipped signs over steps: {said}.")


def _latents(histograms: dict[str, dict[str, Histogram]]) -> Plot:
    """Outlines of the first, middle and last histogram of some layers."""
    layers = _spread(list(histograms), MOST_PANELS)
    columns = min(2, len(layers))
    lines = -(-len(layers) // columns)

    def draw(canvas: Figure, theme: Theme) -> None:
        panels = canvas.subplots(lines, columns, squeeze=False).ravel()
        for axes, layer in zip(panels, layers, strict=False):
            shown = _spread(list(histograms[layer]), MOST_OUTLINES)
            for place, when in enumerate(shown):
                color = depth_colour(theme, place, len(shown))
                axes.stairs(*_density(histograms[layer][when]), color=color, lw=1.5, label=when)
            axes.axvline(0, color=theme.ink, linewidth=0.8)
            axes.set_title(short(layer, 44), weight="normal")
            axes.set_ylim(0, None)
            axes.legend(fontsize=8)
        for axes in panels[len(layers) :]:
            axes.set_visible(False)
        canvas.supxlabel("latent, in mean magnitudes of its matrix", size=10)
        canvas.supylabel("density", size=10)

    first, last = (
        fmean(_near_zero(list(histograms[layer].values())[place]) for layer in layers)
        for place in (0, -1)
    )
    said = (
        f"the bins that touch zero hold {100 * first:.2g} % at first and {100 * last:.2g} % at last"
    )
    caption = (
        f"Distribution of the latents, whose signs are stored, in some layers ({said}). Latents beside zero are "
        "signs that still change easily; a gap around zero means settled signs. The outermost bins hold all that lies "
        "beyond them."
    )
    height = 0.5 + 2.4 * lines
    return plot(
        "latents", height, draw, caption, f"Histograms of latents of {len(layers)} layers: {said}."
    )


def _spread(items: list[str], most: int) -> list[str]:
    """At most so many items: the first, the last, and some evenly between."""
    count = min(most, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _density(histogram: Histogram) -> tuple[list[float], list[float]]:
    """Shares per unit of the axis, and edges."""
    total, edges = sum(histogram.counts) or 1.0, histogram.edges
    return [
        count / total / (high - low)
        for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False)
    ], edges


def _near_zero(histogram: Histogram) -> float:
    """Share of latents in the bins that touch zero."""
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    return sum(n for low, high, n in bins if low <= 0 <= high) / (sum(histogram.counts) or 1.0)
