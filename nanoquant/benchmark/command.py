"""The command ``bench``: measure, print, and leave a file that is whole after every figure."""

from __future__ import annotations

import logging
from typing import Any

from nanoquant.benchmark.config import BenchConfig
from nanoquant.benchmark.report import check_plot, plot_roofline, read_results, report
from nanoquant.benchmark.run import run_bench
from nanoquant.console import ConsoleProgress, check_json_path, note, say, show_logs
from nanoquant.json_files import write_json

logger = logging.getLogger(__name__)


def bench_command(config: BenchConfig) -> None:
    """Measure packed linears and models against bf16 on this machine; print, and write what is asked.

    Raises:
        ValueError: bad input, or matplotlib is missing for a plot.
        FloatingPointError: an implementation is wrong, so nothing is reported.
    """
    check_json_path(config.json)
    check_json_path(config.plot, "--plot")
    if config.plot is not None:
        check_plot()
    show_logs(verbose=False)
    if config.show is None:
        results = _measure(config)
    else:
        results = read_results(config.show, config.plot is not None)
    say(report(results))
    write_json(config.json, results)
    if config.plot is not None:
        plot_roofline(results, config.plot)


def _measure(config: BenchConfig) -> dict[str, Any]:
    """Run the benchmark; whatever ends it, the file keeps what was measured until then."""
    kept = 0

    def keep(results: dict[str, Any]) -> None:
        nonlocal kept
        try:
            write_json(config.json, results)
            kept += config.json is not None
        except OSError as error:  # hours of figures are worth more than a copy on the way
            logger.warning("%s can't be written now: %s", config.json, error)

    progress = ConsoleProgress(["roofs", "correctness", *config.parts_asked])
    try:
        return run_bench(config, progress, keep)
    except BaseException:
        if kept:
            note(f"what was measured is in {config.json}; nanoquant bench --show {config.json}")
        raise
