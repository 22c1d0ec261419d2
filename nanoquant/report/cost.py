"""Section on what the run took: seconds and memory of each phase, and seconds of each block."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nanoquant.report.content import Plot, Section, short
from nanoquant.report.measures import block_seconds, phase_memory, phase_seconds
from nanoquant.report.run_files import Run
from nanoquant.report.style import Draw, Theme, plot, whole_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Units = tuple[tuple[float, str], ...]
TIMES: Units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
BYTES: Units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def cost_section(run: Run) -> Section:
    """Bars of seconds and memory a phase, and of seconds a block."""
    section = Section("cost", "Time and memory")
    seconds, memory, blocks = phase_seconds(run), phase_memory(run), block_seconds(run)
    if seconds:
        section.items.append(_seconds(seconds))
    else:
        section.missing.append("No times of phases: run.json lists none.")
    if memory:
        section.items.append(_memory(memory))
    else:
        section.missing.append("No memory: neither run.json nor metrics.jsonl has memory_bytes.")
    if len(blocks) > 1:
        section.items.append(_block_seconds(blocks))
    return section


def _unit(largest: float, units: Units) -> tuple[float, str]:
    """The largest unit of which there is at least one and a half."""
    return next((unit for unit in units if largest >= 1.5 * unit[0]), units[-1])


def _short(seconds: float) -> str:
    """Seconds with the digits that matter."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _bars(values: dict[str, float], units: Units, what: str, label: Callable[[float], str]) -> Draw:
    """Horizontal bars, from top to bottom in the order of the values."""
    scale, unit = _unit(max(values.values()), units)

    def draw(canvas: Figure, theme: Theme) -> None:
        axes = canvas.subplots()
        bars = axes.barh(range(len(values)), [value / scale for value in values.values()])
        labels = [label(value) for value in values.values()]
        axes.bar_label(bars, labels, padding=4, fontsize=9, color=theme.ink)
        axes.set_yticks(range(len(values)), [short(name) for name in values])
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.grid(False, axis="y")
        axes.set_xlabel(f"{what}, {unit}")

    return draw


def _seconds(seconds: dict[str, float]) -> Plot:
    """Wall time of the phases."""
    total = sum(seconds.values()) or 1.0
    longest = max(seconds, key=lambda name: seconds[name])
    said = f"{_short(total)} s in all, {seconds[longest] / total:.0%} of it in {short(longest)}"
    caption = (
        f"Wall time of each phase in the order of the run, {said}. The longest bar is where fewer windows, steps or "
        "iterations save most."
    )
    draw = _bars(seconds, TIMES, "wall time", lambda s: f"{_short(s)} s, {s / total:.0%}")
    alt = f"Bars of seconds a phase: {said}."
    return plot("phase_seconds", 0.9 + 0.32 * len(seconds), draw, caption, alt)


def _memory(memory: dict[str, float]) -> Plot:
    """Peaks of the phases."""
    byte, unit = _unit(max(memory.values()), BYTES)
    largest = max(memory, key=lambda name: memory[name])
    said = f"the largest is {memory[largest] / byte:.3g} {unit}, in {short(largest)}"
    caption = (
        f"Most memory that the process held in each phase: {said}. That phase decides which machine the run fits on. "
        "Where the system can't forget a peak, bars never get shorter."
    )
    draw = _bars(memory, BYTES, "peak memory", lambda value: f"{value / byte:.3g} {unit}")
    alt = f"Bars of peak memory a phase: {said}."
    return plot("phase_memory", 0.9 + 0.32 * len(memory), draw, caption, alt)


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
        f"Wall time of each block: {said}. Blocks of one shape should take the same; a trend is "
        "other work on the machine or memory that runs short."
    )
    return plot("block_seconds", 2.6, draw, caption, f"Bars of seconds a block: {said}.")
