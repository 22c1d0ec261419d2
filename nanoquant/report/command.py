"""The command ``report``: read a run, make the sections, write the page and the PNGs."""

from __future__ import annotations

from pathlib import Path

from nanoquant.console import ConsoleProgress, note, say, show_logs
from nanoquant.output_folder import check_can_be_made
from nanoquant.recipe import versions
from nanoquant.report.about import page_head, settings_section
from nanoquant.report.config import ReportConfig
from nanoquant.report.content import Plot, Section
from nanoquant.report.cost import cost_section
from nanoquant.report.curves import loss_section, sign_section
from nanoquant.report.layers import error_section, rank_section
from nanoquant.report.page import render
from nanoquant.report.quality import perplexity_section, sample_section
from nanoquant.report.run_files import Run, find_run, read_run
from nanoquant.report.spectra import spectrum_section
from nanoquant.report.style import check_matplotlib

PAGE = "report.html"
FOLDER = "report"
"""Within the folder of the run, where --output does not say otherwise."""

PLOTS = (
    "perplexity layer_errors block_errors ranks model_loss block_loss sign_flips latents spectra "
    "phase_seconds phase_memory block_seconds"
).split()
"""Names of all plots; a PNG of an earlier report that has no figures any more is removed."""


def report_command(config: ReportConfig) -> Path:
    """Write the page and its PNGs, and say where they are and what they lack.

    Returns:
        The page.

    Raises:
        ValueError: there is no run, its format is newer, matplotlib is missing, or the output can't be written.
    """
    check_matplotlib()
    show_logs(verbose=False)
    run = read_run(find_run(config.folder))
    output = Path(config.output) if config.output is not None else run.folder / FOLDER
    check_can_be_made(output, f"the report's folder {str(output)!r}")
    progress = ConsoleProgress(["report"])
    with progress.phase("report", 1):
        sections = make_sections(run, config)
    output.mkdir(parents=True, exist_ok=True)
    plots = [item for section in sections for item in section.items if isinstance(item, Plot)]
    for name in PLOTS:
        (output / f"{name}.png").unlink(missing_ok=True)
    for plot in plots:
        (output / f"{plot.name}.png").write_bytes(plot.light)
    page = output / PAGE
    page.write_text(render(page_head(run), sections, run.problems, versions()), encoding="utf-8")
    for missing in [*run.problems, *(m for section in sections for m in section.missing)]:
        note(missing)
    say(f"{page}: {len(plots)} plots, also as PNG beside it; the run is {run.status}")
    return page


def make_sections(run: Run, config: ReportConfig) -> list[Section]:
    """Every section of the page in its order."""
    return [
        perplexity_section(run, config.records or []),
        error_section(run),
        rank_section(run),
        loss_section(run),
        sign_section(run),
        spectrum_section(run, config.spectra),
        cost_section(run),
        sample_section(run),
        settings_section(run),
    ]
