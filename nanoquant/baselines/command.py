"""``nanoquant evaluate MODEL --baselines ...`` and ``--table ...``: run baselines, show records, draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.records import read_comparable, rows_of
from nanoquant.baselines.registry import needs_text
from nanoquant.baselines.report import check_plottable, plot_pareto, records_table
from nanoquant.baselines.run import BaselineRuns, Measurement, chosen_names
from nanoquant.checkpoint_files import read_json
from nanoquant.console import ConsoleProgress, say
from nanoquant.data import bos_of, load_tokens, make_windows
from nanoquant.evaluation.record import prepare_windows
from nanoquant.evaluation.request import EvaluationRequest
from nanoquant.output_folder import check_can_be_made
from nanoquant.sources import (
    device_of,
    find_model,
    load_model,
    load_tokenizer,
    quantization_method,
)


def run_baselines(
    model: str,
    names: str,
    config: BaselineConfig,
    request: EvaluationRequest,
    device: str,
    folder: str | None,
    plot: str | None,
) -> dict[str, Any]:
    """Run and measure baselines of a dense model; print their table, and draw it if asked.

    Args:
        model: folder or Hub name.
        names: of baselines, separated by commas, or all.
        config: settings of the baselines.
        request: what is measured.
        device: auto, cpu or cuda.
        folder: where the record of each is kept.
        plot: PNG file.

    Returns:
        "rows" of the table and "records" by name.

    Raises:
        ValueError: a name, the model, a text or a record in the folder is not usable.
    """
    chosen = chosen_names(names, config)
    if request.empty:
        raise ValueError("nothing to measure: give --text, --protocol or --zero-shot")
    if plot is not None and not request.protocols:
        raise ValueError("--plot draws perplexity: give --text or --protocol")
    if folder is not None:
        check_can_be_made(Path(folder).absolute(), f"--out {folder}")
    if _same_text(config.text, request.text):
        raise ValueError(
            f"{config.text} is both the calibration text and the text of the evaluation; give --baseline.text another"
        )
    source, target = find_model(model), device_of(device)
    method = quantization_method(source)
    if method is not None:
        raise ValueError(f"baselines start from dense weights, and {model} is quantized ({method})")
    tokenizer = load_tokenizer(source)
    calibration = None
    if any(needs_text(name) for name in chosen):
        tokens = load_tokens(str(config.text), tokenizer)
        calibration = make_windows(tokens, config.length, config.windows, bos_of(tokenizer))
    model_type = read_json(source / "config.json").get("model_type", "")
    windows = prepare_windows(request, tokenizer, model_type)
    with ConsoleProgress(["load"]).phase("load", 1):
        dense = load_model(source, target)
    measurement = Measurement(name=model, tokenizer=tokenizer, request=request, windows=windows)
    records = BaselineRuns(dense, measurement, config, calibration, folder)(chosen)
    found = _show(records, plot)
    return found | {"records": dict(zip(chosen, records, strict=True))}


def show_records(files: Sequence[str], plot: str | None) -> dict[str, Any]:
    """Print the table of records, and draw it if asked.

    Args:
        files: that ``evaluate --json`` or ``--out`` wrote.
        plot: PNG file.

    Returns:
        "rows" of the table.

    Raises:
        ValueError: a file is no record, or they measured different things.
    """
    return _show(read_comparable(files), plot)


def _same_text(one: str | None, two: str | None) -> bool:
    """Whether two sources are one text; a file may be written in two ways."""
    return one is not None and two is not None and Path(one).resolve() == Path(two).resolve()


def _show(records: Sequence[dict[str, Any]], plot: str | None) -> dict[str, Any]:
    """Table and plot."""
    if plot is not None:
        check_plottable(records)
    say(records_table(records))
    if plot is not None:
        plot_pareto(records, plot)
    return {"rows": [asdict(row) for row in rows_of(records)]}
