"""Section on what the run took: seconds of each phase and block, and memory over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoquant.report.content import Plot, Section, short
from nanoquant.report.measures import Curve, block_seconds, memory_curve, phase_seconds
from nanoquant.report.record import Run
from nanoquant.report.style import Theme, plot, whole_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def cost_section(run: Run) -> Section:
    """Bars of seconds a phase, seconds a block, and a curve of memory."""
    section = Section("cost", "Time and memory")
    seconds, blocks, memory = phase_seconds(run), block_seconds(run), memory_curve(run)
    if seconds:
        section.items.append(_seconds(seconds))
    else:
        section.missing.append("No times of phases: run.json lists none.")
    if len(blocks) > 1:
        section.items.append(_block_seconds(blocks))
    if memory:
        section.items.append(_memory(memory))
    else:
        section.missing.append("No memory over time: no line of metrics.jsonl has memory_bytes.")
    return section


def _unit(largest: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit of which there is at least one and a half."""
    return next((unit for unit in units if largest >= 1.5 * unit[0]), units[-1])


def _short(seconds: float) -> str:
    """Seconds with the digits that matter."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _seconds(seconds: dict[str, float]) -> Plot:
    """Horizontal bars in the order of the run."""
    scale, unit = _unit(max(seconds.values()), UNITS)
    total = sum(seconds.values())

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        bars = axes.barh([short(name) for name in seconds], [s / scale for s in seconds.values()])
        labels = [f"{_short(s)} s, {s / (total or 1):.0%}" for s in seconds.values()]
        axes.bar_label(bars, labels, padding=4, fontsize=9, color=theme.ink)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.grid(False, axis="y")
        axes.set_xlabel(unit)

    longest = max(seconds, key=lambda name: seconds[name])
    said = (
        f"{_short(total)} s in all, {seconds[longest] / (total or 1):.0%} of it in {short(longest)}"
    )
    caption = (
        f"Wall time of each phase in the order of the run, {said}. The longest bar is where fewer windows, steps or "
        "iterations save most."
    )
    height = 0.9 + 0.32 * len(seconds)
    return plot("phase_seconds", height, draw, caption, f"Bars of seconds a phase: {said}.")


def _block_seconds(blocks: dict[int, float]) -> Plot:
    """Seconds of each block."""

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        axes.bar(list(blocks), list(blocks.values()))
        axes.set(xlabel="decoder block", ylabel="seconds")
        axes.grid(False, axis="x")
        whole_ticks(axes.xaxis)

    slow = max(blocks, key=lambda block: blocks[block])
    said = f"the slowest is block {slow} with {_short(blocks[slow])} s"
    caption = (
        f"Wall time of each block, calibration excluded: {said}. Blocks of one shape should take the same; a trend is "
        "other work on the machine or memory that runs short."
    )
    return plot("block_seconds", 2.6, draw, caption, f"Bars of seconds a block: {said}.")


def _memory(memory: dict[str, Curve]) -> Plot:
    """Bytes over time, a curve a phase."""
    last = max(step for curve in memory.values() for step in curve.steps)
    peak = max((max(curve.values), phase) for phase, curve in memory.items())
    (second, time_unit), (byte, byte_unit) = _unit(last, UNITS), _unit(peak[0], BYTE_UNITS)

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        for phase, curve in memory.items():
            x, y = [t / second for t in curve.steps], [value / byte for value in curve.values]
            axes.plot(x, y, marker=".", markersize=4, label=short(phase))
        axes.set(
            xlabel=f"{time_unit} since the start", ylabel=f"memory, {byte_unit}", ylim=(0, None)
        )
        canvas.legend(loc="outside upper left", ncols=len(memory))

    said = f"the peak is {peak[0] / byte:.3g} {byte_unit}, in phase {short(peak[1])}"
    caption = (
        f"Memory that the process held at each record ({said}). Steps up are copies of the model or of activations; a "
        "slope within a phase is something that is kept though nobody needs it. Peaks between records are not seen."
    )
    return plot("memory", 3.0, draw, caption, f"Memory over time: {said}.")
