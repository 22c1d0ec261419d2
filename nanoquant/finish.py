"""The end of a job: verify and measure the checkpoint, and close the record; a run killed in it goes on here."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nanoquant.checkpoint import read_sizes
from nanoquant.checkpoint_files import read_json
from nanoquant.config import NanoQuantConfig
from nanoquant.console import say
from nanoquant.figures import Figures, JobResult, result_table
from nanoquant.hub.publish import write_card
from nanoquant.job_config import JobConfig
from nanoquant.json_files import finite, write_json
from nanoquant.lock import exclusive
from nanoquant.measuring import measure_in_fresh_process
from nanoquant.quantize import QuantizationReport
from nanoquant.recipe import versions
from nanoquant.sources import weight_bytes
from nanoquant.tracking.folder import RunFolder, read_run, run_folder
from nanoquant.tracking.tracker import RunTracker, TrackedProgress
from nanoquant.unfinished import discard
from nanoquant.verification import Verification

logger = logging.getLogger(__name__)

PHASE = "measure in a fresh process"
UNMEASURED = "unmeasured"
"""Field of run.json with what the end of a job needs, until it is over."""


@dataclass(frozen=True)
class Ending:
    """What is known when the checkpoint is written."""

    dense: Figures
    report: dict[str, Any]
    most_perplexity: float | None
    """Perplexity up to which the checkpoint passes; None: any."""

    @classmethod
    def of(
        cls, job: JobConfig, model: PreTrainedModel, dense: Figures, report: QuantizationReport
    ) -> Ending:
        """From the model that is about to be saved."""
        most = None
        if job.eval_guard is not None:
            most = job.eval_guard * model.get_input_embeddings().num_embeddings
            most = None if (dense.perplexity or 0) > most else most
        return cls(dense, report.to_dict(), most)


def finish(
    job: JobConfig,
    device: torch.device,
    tracker: RunTracker,
    progress: TrackedProgress,
    ending: Ending,
) -> JobResult:
    """Measure the checkpoint in a fresh process, print the table, write figures and model card.

    Raises:
        ValueError: the checkpoint does not pass, or measuring failed; table and figures have all that is known.
    """
    quantized = Figures(weight_bytes(Path(job.output)), read_sizes(job.output).to_dict())
    verification, left = Verification(), asdict(ending)
    try:
        with progress.phase(PHASE, 0):
            most = ending.most_perplexity
            measure_in_fresh_process(job, device, quantized, most, verification)
        left = None
    finally:  # what is known is never lost
        checks = verification.to_list() if job.verify else None
        known = (ending.dense, quantized, ending.report, dict(progress.seconds), versions())
        result = JobResult(asdict(job), *known, checks)
        record_figures(tracker, quantized, "quantized")
        tracker.folder.update(figures=result.to_dict(), **{UNMEASURED: left})
        say(result_table(result))
        write_json(job.json, result.to_dict())
    try:
        write_card(job.output, tracker.folder.content)
    except Exception as error:  # the checkpoint is worth more than its card
        logger.warning("no model card was written (%s); nanoquant card %s does", error, job.output)
    return result


def left_unmeasured(job: JobConfig, config: NanoQuantConfig) -> bool:
    """Whether all that is left of a job is its end: a run of it was killed when the checkpoint was whole."""
    record, file = read_run(run_folder(job.output)), Path(job.output) / "config.json"
    left, same = record.get(UNMEASURED), (finite(asdict(job)), finite(config.to_dict()))
    if not left or (record.get("job"), record.get("config")) != same or not file.is_file():
        return False
    recipe = (read_json(file).get("quantization_config") or {}).get("recipe") or {}
    return recipe.get("seconds") == left["report"]["seconds"]  # of this very run


def finish_left(job: JobConfig, device: torch.device) -> JobResult:
    """Do the end of a job alone; raises as :func:`finish`."""
    folder = run_folder(job.output)
    with ExitStack() as held:
        held.enter_context(exclusive(folder))
        record = read_run(folder)
        ending = Ending(**record[UNMEASURED] | {"dense": Figures(**record[UNMEASURED]["dense"])})
        about = record | {"status": "running", "error": None}
        tracker, progress = (
            RunTracker(RunFolder(folder, about, anew=False)),
            TrackedProgress([PHASE]),
        )
        progress.follow(tracker)
        progress.seconds |= record["seconds"]
        held.enter_context(tracker.following())
        discard(folder)
        return finish(job, device, tracker, progress, ending)


def record_figures(tracker: RunTracker, figures: Figures, whose: str) -> None:
    """Sizes and perplexity of the dense or the quantized model as a record."""
    found = {"perplexity": figures.perplexity, "file_bytes": figures.file_bytes, **figures.sizes}
    known = {name: value for name, value in found.items() if value is not None}
    tracker.record("evaluate", model=whose, **known)
