"""Running the cells of a plan: each leaves one JSON record, and one that is finished is never run again."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.ablation.plan import Cell, Plan
from nanoquant.config import NanoQuantConfig
from nanoquant.console import ConsoleProgress, note
from nanoquant.evaluation.perplexity import perplexity
from nanoquant.json_files import parse_json, read_text, write_json
from nanoquant.measuring import evaluation_windows, free_memory
from nanoquant.mixture import Source, read_sources
from nanoquant.phases import precision_of
from nanoquant.quantize import phase_names, quantize
from nanoquant.recipe import versions
from nanoquant.sources import device_of, find_model, load_model, load_tokenizer
from nanoquant.text_plan import TextPlan, plan_text
from nanoquant.tracking.layout import Layout

logger = logging.getLogger(__name__)

FORMAT = 1


class CellRecorder:
    """A recorder that keeps what the layers' errors are, and what the model is worth before it trains as a whole.

    Args:
        measure: gives the perplexity of the model as it is.
    """

    wanted = True

    def __init__(self, measure: Callable[[], float]) -> None:
        self.layout, self.measure = Layout(), measure
        self.untrained: float | None = None
        self.begun: float | None = None
        self.spent = 0.0
        """Seconds of that measurement."""

    def record(self, phase: str, **metrics: Any) -> None:  # noqa: ANN401
        """Keep errors of layers; measure at the first record of the last phase."""
        if phase == "model" and self.begun is None:
            self.begun = time.perf_counter()
            try:
                self.untrained = self.measure()
            except Exception as error:  # a run is worth more than its record
                logger.warning("the model before its training was not measured: %s", error)
            self.spent = time.perf_counter() - self.begun
        for _ in self.layout.points({"phase": phase, **metrics}):
            pass

    def means(self) -> dict[str, float]:
        """Mean error over all weights after each phase that has any: "initialize", "block", "model"."""
        found = {}
        for phase in ("initialize", "block", "model"):
            if mean := self.layout.mean_error(phase):
                found[phase] = mean
        return found


@dataclass
class Shared:
    """What the cells of one model share: the dense model, texts by name, the dense perplexity by text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    sources: dict[str, list[Source]] = field(default_factory=dict)
    held_out: dict[str, tuple[Tensor, float]] = field(default_factory=dict)

    def text(self, cell: Cell) -> TextPlan:
        """The calibration text of a cell; every text is read once."""
        key = str(cell.job.text)
        if key not in self.sources:
            self.sources[key] = read_sources(cell.job.text, self.tokenizer)
        return plan_text(self.sources[key], self.tokenizer, cell.config)

    def evaluation(self, cell: Cell) -> tuple[Tensor, float]:
        """Held-out windows of a cell, and the dense model's perplexity on them."""
        key = str(cell.job.evaluation)
        if key not in self.held_out:
            windows = evaluation_windows(cell.job.evaluation, self.tokenizer)
            self.held_out[key] = windows, perplexity(self.model, windows).value
        return self.held_out[key]


def run_plan(plan: Plan, folder: str | Path) -> list[dict[str, Any]]:
    """Run what is not finished, and return the records of all cells in the plan's order.

    Args:
        plan: the cells.
        folder: takes ``cells/NAME.json``; made if need be.
    """
    place = Path(folder) / "cells"
    place.mkdir(parents=True, exist_ok=True)
    shared, records = None, []
    for number, cell in enumerate(plan.cells, 1):
        file = place / f"{cell.key}.json"
        record = read_record(file)
        if record.get("status") != "finished":
            note(f"cell {number} of {len(plan.cells)}: {cell.key}")
            shared = shared or prepare(cell, Path(folder))
            record = run_cell(cell, shared)
            write_json(str(file), record)
        records.append(record)
    return records


def read_record(file: Path) -> dict[str, Any]:
    """A cell's record; empty where there is none, or one that can't be read, which is then made again."""
    try:
        record = parse_json(read_text(file))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("format") == FORMAT else {}


def prepare(cell: Cell, place: Path) -> Shared:
    """Load the model that all cells start from; ``place`` keeps what it writes."""
    folder = find_model(cell.job.source)
    device = device_of(cell.config.run.accelerator)
    return Shared(load_model(folder, device, trainable=True), load_tokenizer(folder), place)


def run_cell(cell: Cell, shared: Shared) -> dict[str, Any]:
    """Quantize a copy of the dense model and measure it; a failure is a record as well."""
    record = {
        "format": FORMAT,
        "status": "failed",
        "error": None,
        "model": cell.job.source,
        "choices": cell.choices,
        "flags": cell.flags,
        "config": cell.config.to_dict(),
        "versions": versions(),
    }
    begun = time.perf_counter()
    try:
        record |= measure_cell(cell, shared) | {"status": "finished"}
    except Exception as error:  # the other cells go on, and the table names this one
        record["error"] = f"{type(error).__name__}: {error}"
        logger.warning("cell %s failed: %s", cell.key, record["error"])
    free_memory()
    return record | {"seconds": time.perf_counter() - begun}


def measure_cell(cell: Cell, shared: Shared) -> dict[str, Any]:
    """Figures of one quantization."""
    windows, before = shared.evaluation(cell)
    model, plan = copy.deepcopy(shared.model), shared.text(cell)
    recorder = CellRecorder(lambda: perplexity_in_training(model, windows, cell.config))
    report = quantize(
        model,
        plan,
        cell.config,
        shared.tokenizer,
        progress=ConsoleProgress(phase_names(cell.config, bool(plan.written))),
        recorder=recorder,
        self_text_file=cell.job.self_text_file or shared.folder,
        sensitivity_file=shared.folder,
    )
    held_out = report.model.held_out
    ranks = [size for size in report.ranks.values() if isinstance(size, int)]  # codebooks have none
    measured, seconds = perplexity(model, windows).value, dict(report.seconds)
    if recorder.begun is not None:
        seconds["model"] -= recorder.spent
    return {
        "dense_perplexity": before,
        "perplexity": measured,
        "untrained_perplexity": measured if recorder.begun is None else recorder.untrained,
        "bits": report.bits,
        "mean_rank": sum(ranks) / len(ranks) if ranks else None,
        "errors": recorder.means(),
        "divergence": held_out.get(report.model.best_step),
        "phase_seconds": seconds,
    }


def perplexity_in_training(
    model: PreTrainedModel, windows: Tensor, config: NanoQuantConfig
) -> float:
    """Perplexity of a model whose layers are ready to train, in the precision in which they do."""
    mixed = precision_of(model, config) == "bf16-mixed"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        return perplexity(model, windows).value
