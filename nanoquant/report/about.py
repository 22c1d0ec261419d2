"""The head of the page and its last section: what run this is, how it ended, settings and versions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nanoquant.report.content import Section, Table, figure
from nanoquant.report.measures import layer_grids, measured, phase_order
from nanoquant.report.run_files import Run, number

STATES = {
    "finished": "finished",
    "failed": "failed",
    "running": "not finished",
    "unknown": "state unknown",
}


@dataclass(frozen=True)
class Head:
    """Title, state, a paragraph on the state, and the main figures as (name, value)."""

    title: str
    source: str
    state: str
    status: str
    explained: str
    figures: list[tuple[str, str]]


def page_head(run: Run) -> Head:
    """What stands above everything."""
    source = run.text("source") or "an unknown model"
    return Head(
        run.name or run.folder.name,
        source,
        STATES[run.status],
        run.status,
        _explained(run),
        [(name, value) for name, value in _figures(run) if value != "-"],
    )


def _explained(run: Run) -> str:
    """How far the run got, in words."""
    phases = phase_order(row["phase"] for row in run.rows)
    times = [t for row in run.rows if (t := number(row.get("t"))) is not None]
    initialized = layer_grids(run, "error").get("initialize")
    far = f"{len(run.rows):,} records" + (f", the last after {max(times):,.0f} s" if times else "")
    far += f", phases {', '.join(phases)}" if phases else ""
    if initialized:
        far += f"; {len(initialized.values)} layers in {len(initialized.blocks)} blocks initialized"
    if run.status == "finished":
        return f"The run is complete: {far}."
    if run.status == "failed":
        why = run.text("error") or "run.json does not say why"
        return f"The run failed: {why}. What it recorded until then is here: {far}."
    if run.status == "running":
        phase = run.text("phase")
        where = f" in the phase {phase}" if phase else ""
        return (
            f"run.json still says that the run is at work{where}. If no process is, it was killed. So far: {far}. "
            "Figures that come at the end are missing."
        )
    return f"Nothing says how the run ended. Its metrics: {far}."


def _figures(run: Run) -> list[tuple[str, str]]:
    """The main figures of a finished run; "-" for those that are not known."""
    models, sizes = ("dense", "quantized"), ("figures", "quantized", "sizes")
    dense, quantized = (measured(run, who, "perplexity") for who in models)
    before, after = (measured(run, who, "file_bytes") for who in models)
    excess = None
    if dense and quantized and dense > 0 and quantized > 0:
        excess = math.log(quantized) - math.log(dense)
    seconds = run.get("seconds")
    seconds = seconds.values() if isinstance(seconds, dict) else []
    total = sum(value for value in map(number, seconds) if value is not None)
    return [
        ("bits per weight, body", figure(run.number(*sizes, "body_bits_per_weight"), ".4f")),
        ("bits, whole model", figure(run.number(*sizes, "model_bits_per_parameter"), ".3f")),
        ("weight files, MB", _pair(before, after, lambda value: f"{value / 1e6:.1f}")),
        ("perplexity", _pair(dense, quantized, lambda value: f"{value:.4g}")),
        ("excess, nats a token", figure(excess, ".3f")),
        ("minutes", f"{total / 60:.1f}" if total else "-"),
    ]


def _pair(before: float | None, after: float | None, form: Any) -> str:  # noqa: ANN401
    """Both values as "before to after", as far as they are known."""
    if after is None:
        return "-" if before is None else f"{form(before)} (dense)"
    return form(after) if before is None else f"{form(before)} to {form(after)}"


def settings_section(run: Run) -> Section:
    """Job, configuration and versions."""
    section = Section("settings", "Settings and versions")
    started = run.text("started")
    parts = (("versions", "Versions."), ("job", "What was read, written and measured."))
    for key, caption in (*parts, ("config", "Configuration of the method.")):
        values = run.get(key)
        if isinstance(values, dict) and values:
            rows = [[name, _plain(value)] for name, value in flat(values).items()]
            rows += [["started", started]] if key == "job" and started else []
            section.items.append(Table(caption, ["name", "value"], rows, folded=True))
        else:
            section.missing.append(f"No {key}: run.json does not have them.")
    return section


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _plain(value: Any) -> str:  # noqa: ANN401
    """A value as people write it."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
