"""The job of ``nanoquant quantize``: dense figures, quantization, checkpoint, figures of the checkpoint.

Everything that can be refused is refused before the first long step. The checkpoint is measured in a
fresh process that knows nothing but its folder.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nanoquant.architectures import decoder_from_structure
from nanoquant.checkpoint import save_pretrained
from nanoquant.config import NanoQuantConfig
from nanoquant.console import check_json_path, show_logs
from nanoquant.disk import check_run
from nanoquant.estimate.limits import fit
from nanoquant.estimate.subject import subject_of_folder
from nanoquant.estimate.terms import Use
from nanoquant.evaluation.perplexity import check_length
from nanoquant.figures import JobResult
from nanoquant.finish import (
    PHASE,
    UNMEASURED,
    Ending,
    finish,
    finish_left,
    left_unmeasured,
    record_figures,
)
from nanoquant.job_config import JobConfig
from nanoquant.lock import exclusive
from nanoquant.measuring import evaluation_windows, free_memory, measure_dense
from nanoquant.memory import process_bytes
from nanoquant.offload import offload
from nanoquant.output_folder import check_can_be_made, check_output_folder, torn_checkpoint
from nanoquant.processes import first, join, on_first, world_size
from nanoquant.progress import Progress
from nanoquant.quantize import check_model, phase_names, quantize
from nanoquant.recipe import make_recipe, versions
from nanoquant.self_text import check_kept
from nanoquant.sources import (
    check_dense,
    device_of,
    find_model,
    load_model,
    load_tokenizer,
    weight_bytes,
)
from nanoquant.text_plan import TextPlan, plan_text
from nanoquant.tracking.folder import RunFolder, run_folder
from nanoquant.tracking.loggers import make_sinks
from nanoquant.tracking.tracker import RunTracker, TrackedProgress
from nanoquant.unfinished import check_settings, discard


def run_job(job: JobConfig, config: NanoQuantConfig) -> JobResult | None:
    """Quantize a model, measure it before and after, and print one table.

    Of several processes the first one does all but the quantization itself, and has the result; the others give None.

    Raises:
        ValueError: any input does not allow it, and nothing has been written; or the checkpoint is
            written, but measuring it failed. Then the table and the JSON hold all other figures.
    """
    device = device_of(config.run.accelerator)
    join(device.type, config.run.timeout)
    show_logs(job.verbose)
    if on_first(lambda: left_unmeasured(job, config)):
        check_json_path(job.json)
        with exclusive(run_folder(job.output)):
            return finish_left(job, device) if first() else None
    if not torn_checkpoint(job.output):
        check_output_folder(job.output)
    check_can_be_made(run_folder(job.output), "the record of the run")
    check_json_path(job.json)
    folder = find_model(job.source)
    check_dense(folder)
    if Path(job.output).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the output folder {job.output!r} lies in that of the model, whose files are copied: {folder}"
        )
    planned = on_first(lambda: within_memory(folder, device, job, config))
    tokenizer = load_tokenizer(folder)
    plan = plan_text(job.text, tokenizer, config)
    windows = None if job.evaluation is None else evaluation_windows(job.evaluation, tokenizer)
    phases = job_phases(job, config, plan)
    begun, progress = time.perf_counter(), TrackedProgress(phases) if first() else Progress()
    with progress.phase("load", 1):
        model = load_checked(folder, device, job, planned, plan, windows)
    with ExitStack() as held:
        held.enter_context(exclusive(run_folder(job.output)))
        on_first(lambda: clear_output(job.output))
        check_settings(run_folder(job.output), model, plan, config)
        places = {name: run_folder(job.output) for name in ("sensitivity_file", "work")}
        places["self_text_file"] = job.self_text_file or run_folder(job.output)
        if not first():
            quantize(model, plan, planned, tokenizer, **places)
            return None
        tracker = start_record(job, config, begun)
        progress.follow(tracker)
        held.enter_context(tracker.following())
        keep = None if config.run.save_every is None else run_folder(job.output)
        stored = weight_bytes(folder)
        dense = measure_dense(model, tokenizer, windows, job, progress, stored, keep)
        record_figures(tracker, dense, "dense")
        report = quantize(
            model,
            plan,
            planned,  # on record is what was asked, so that the same command goes on
            tokenizer,
            progress=progress,
            recorder=tracker,
            **places,
        )
        ending = Ending.of(job, model, dense, report)
        tracker.folder.update(**{UNMEASURED: asdict(ending)})
        with progress.phase("save", 1):
            asked = (job.source, job.text)
            recipe = make_recipe(*asked, report.bits, report.config, report.seconds)
            save_pretrained(model, job.output, folder, tokenizer, recipe=recipe)
            discard(run_folder(job.output))
        del model
        free_memory()
        return finish(job, device, tracker, progress, ending)


def within_memory(
    folder: Path, device: torch.device, job: JobConfig, config: NanoQuantConfig
) -> NanoQuantConfig:
    """The configuration that keeps the promised memory, see :func:`nanoquant.estimate.limits.fit`."""
    limits = (job.max_memory, job.max_gpu_memory)
    if limits == (None, None):
        return config
    length = job.eval_length if job.evaluation is not None else None
    use = Use(process_bytes(), device.type == "cuda", length, job.verify, world_size(), job.text)
    return fit(subject_of_folder(folder, config), config, use, *limits)


def clear_output(output: str) -> None:
    """Delete what a run left that was killed while it saved; errors as of :func:`check_output_folder`."""
    if torn_checkpoint(output):
        shutil.rmtree(output)
    check_output_folder(output)  # another process may have ended meanwhile


def load_checked(
    folder: Path,
    device: torch.device,
    job: JobConfig,
    config: NanoQuantConfig,
    plan: TextPlan,
    windows: Tensor | None,
) -> PreTrainedModel:
    """The dense model.

    Raises:
        ValueError: the budget, the texts, the file for written text or the room on the disk do not fit it.
    """
    if job.self_text_file is not None and not plan.written:
        raise ValueError(
            f'--self-text-file {job.self_text_file} is given, but the model writes nothing; ask with --text "self" '
            "or --self-text.windows N, or leave it out"
        )
    if config.run.offload and device.type == "cpu":
        raise ValueError(
            "run.offload and a run on the CPU exclude each other: blocks are in main memory there anyway; leave it out"
        )
    home = torch.device("cpu") if config.run.offload else device
    model = load_model(folder, home, trainable=True)
    if config.run.offload:
        offload(model, decoder_from_structure(model).blocks, device)
    check_model(model, plan, config)
    if plan.written:
        check_kept(job.self_text_file, model, config.self_text, config.run.seed, plan.own)
    check_run(job.output, run_folder(job.output), model, config)
    if windows is not None:
        check_length(model, windows.shape[1])
    return model


def start_record(job: JobConfig, config: NanoQuantConfig, begun: float) -> RunTracker:
    """The run's folder and loggers; from here on the run is on record, however it ends."""
    about = {
        "status": "running",
        "error": None,
        "source": job.source,
        "output": job.output,
        "directory": os.getcwd(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        "job": asdict(job),
        "versions": versions(),
        "seconds": {},
        "figures": None,
    }
    folder = RunFolder(run_folder(job.output), about)
    return RunTracker(folder, make_sinks(job.logger, folder), begun)


def job_phases(job: JobConfig, config: NanoQuantConfig, plan: TextPlan) -> list[str]:
    """The phases to come, in order."""
    dense = ["measure dense"] if job.measures else []
    names = phase_names(config, bool(plan.written))
    return ["load", *dense, *names, "save", PHASE]
