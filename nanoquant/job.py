"""The job of ``nanoquant quantize``: dense figures, quantization, checkpoint, figures of the checkpoint.

Everything that can be refused is refused before the first long step. The checkpoint is measured in a
fresh process that knows nothing but its folder.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.architectures import find_decoder
from nanoquant.checkpoint import read_sizes, save_pretrained
from nanoquant.checkpoint_files import check_output_folder
from nanoquant.config import NanoQuantConfig
from nanoquant.console import ConsoleProgress, check_json_path, say, show_logs
from nanoquant.data import DataConfig, bos_of, load_tokens, make_windows
from nanoquant.evaluation.perplexity import check_length, perplexity
from nanoquant.figures import Figures, JobResult, result_table, versions
from nanoquant.generate import SAMPLE_TOKENS, check_sample, greedy_sample
from nanoquant.json_files import write_json
from nanoquant.lock import exclusive
from nanoquant.quantize import QuantizationReport, check_model, phase_names, quantize
from nanoquant.ranks import check_budget
from nanoquant.self_text import check_kept, check_place
from nanoquant.sizes import measure_sizes
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
from nanoquant.tracking.loggers import check_logger, make_sinks
from nanoquant.tracking.tracker import RunTracker, TrackedProgress
from nanoquant.unfinished import discard


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What is read, written and measured."""

    source: str
    """Folder or Hub name of the dense model."""
    output: str
    """New or empty folder for the checkpoint."""
    text: list[str] | str
    """Calibration text: a text, .jsonl, .pt or .safetensors file, a data set as name:config:split, or self, which the
    model writes; several times for a mixture, with weights as train.txt=3."""
    self_text_file: str | None = None
    """File or folder that keeps the text that the model writes, for other runs as well; null: in OUT.run."""
    eval_text: str | None = None
    """Held-out text for perplexity, of the same kinds; null: not measured."""
    eval_windows: int = DataConfig.windows
    """Windows of the held-out text."""
    eval_length: int = DataConfig.length
    """Tokens of such a window."""
    sample: str | None = None
    """Prompt that both models continue; null: no sample."""
    sample_tokens: int = SAMPLE_TOKENS
    """Most new tokens of a sample."""
    json: str | None = None
    """File for every printed figure."""
    logger: str = "csv"
    """Where metrics go besides OUT.run/metrics.jsonl: csv, or also tensorboard or wandb (offline without a key)."""
    verbose: bool = False
    """Show what each block and each held-out measurement gave."""

    def __post_init__(self) -> None:
        if isinstance(self.text, list) and len(self.text) == 1:
            object.__setattr__(self, "text", self.text[0])  # one text is on record as itself
        if self.self_text_file is not None:
            check_place(self.self_text_file)
        check_logger(self.logger)
        if self.sample is not None:
            check_sample(self.sample, self.sample_tokens)
        if self.json is not None and Path(self.json).absolute() == Path(self.output).absolute():
            raise ValueError(f"--json {self.json} is the output folder; give a file")

    @property
    def evaluation(self) -> DataConfig | None:
        """Text and windows of the perplexity; None without a text."""
        if self.eval_text is None:
            return None
        return DataConfig(text=self.eval_text, windows=self.eval_windows, length=self.eval_length)

    @property
    def measures(self) -> bool:
        """Whether a model has to run for the figures."""
        return self.evaluation is not None or self.sample is not None


def run_job(job: JobConfig, config: NanoQuantConfig) -> JobResult:
    """Quantize a model, measure it before and after, and print one table.

    Raises:
        ValueError: any input does not allow it, and nothing has been written; or the checkpoint is
            written, but measuring it failed. Then the table and the JSON hold all other figures.
    """
    show_logs(job.verbose)
    check_output_folder(job.output)
    check_json_path(job.json)
    device = device_of(config.run.accelerator)
    folder = find_model(job.source)
    check_dense(folder)
    tokenizer = load_tokenizer(folder)
    plan = plan_text(job.text, tokenizer, config)
    windows = None if job.evaluation is None else evaluation_windows(job.evaluation, tokenizer)
    begun, progress = time.perf_counter(), TrackedProgress(job_phases(job, config, plan))
    with progress.phase("load", 1):
        model = load_checked(folder, device, job, config, plan, windows)
    with ExitStack() as held:
        held.enter_context(exclusive(run_folder(job.output)))
        tracker = start_record(job, config, begun)
        progress.follow(tracker)
        held.enter_context(tracker.following())
        dense = measure(model, tokenizer, windows, job, progress, weight_bytes(folder))
        record_figures(tracker, dense, "dense")
        report = quantize(
            model,
            plan,
            config,
            tokenizer,
            progress=progress,
            recorder=tracker,
            self_text_file=job.self_text_file or run_folder(job.output),
            sensitivity_file=run_folder(job.output),
            work=run_folder(job.output),
        )
        with progress.phase("save", 1):
            recipe = recipe_of(job, report)
            save_pretrained(model, job.output, folder, tokenizer, recipe=recipe)
            discard(run_folder(job.output))
        quantized = Figures(weight_bytes(Path(job.output)), read_sizes(job.output).to_dict())
        del model
        free_memory()
        try:
            with progress.phase("measure in a fresh process", 0):
                measure_in_fresh_process(job, device, quantized)
        finally:  # what is known is never lost
            seconds = dict(progress.seconds)
            result = JobResult(asdict(job), dense, quantized, report.to_dict(), seconds, versions())
            record_figures(tracker, quantized, "quantized")
            tracker.folder.update(figures=result.to_dict())
            say(result_table(result))
            write_json(job.json, result.to_dict())
    return result


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
        ValueError: the budget, the texts or the file for written text do not fit it.
    """
    if job.self_text_file is not None and not plan.written:
        raise ValueError(
            f'--self-text-file {job.self_text_file} is given, but the model writes nothing; ask with --text "self" '
            "or --self-text.windows N, or leave it out"
        )
    model = load_model(folder, device, trainable=True)
    check_model(model, plan, config)
    if plan.written:
        check_kept(job.self_text_file, model, config.self_text, config.run.seed, plan.own)
    decoder = find_decoder(model)
    check_budget(model, decoder, config.block_range(len(decoder.blocks)), config)
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
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_dict(),
        "job": asdict(job),
        "versions": versions(),
        "seconds": {},
        "figures": None,
    }
    folder = RunFolder(run_folder(job.output), about)
    return RunTracker(folder, make_sinks(job.logger, folder), begun)


def record_figures(tracker: RunTracker, figures: Figures, whose: str) -> None:
    """Sizes and perplexity of the dense or the quantized model as a record."""
    found = {"perplexity": figures.perplexity, "file_bytes": figures.file_bytes, **figures.sizes}
    known = {name: value for name, value in found.items() if value is not None}
    tracker.record("evaluate", model=whose, **known)


def job_phases(job: JobConfig, config: NanoQuantConfig, plan: TextPlan) -> list[str]:
    """The phases to come, in order."""
    dense = ["measure dense"] if job.measures else []
    names = phase_names(config, bool(plan.written))
    return ["load", *dense, *names, "save", "measure in a fresh process"]


def evaluation_windows(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows (N, T) of a held-out text."""
    tokens = load_tokens(data.text, tokenizer)
    return make_windows(tokens, data.length, data.windows, bos_of(tokenizer), data.seed)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor | None,
    job: JobConfig,
    progress: ConsoleProgress,
    file_bytes: int,
) -> Figures:
    """Figures of the dense model in this process."""
    figures = Figures(file_bytes, measure_sizes(model).to_dict())
    if not job.measures:
        return figures
    with progress.phase("measure dense", 0 if windows is None else len(windows)):
        if windows is not None:
            figures.perplexity = perplexity(model, windows, progress=progress.step).value
        if job.sample is not None:
            figures.sample = greedy_sample(model, tokenizer, job.sample, job.sample_tokens)
    return figures


def free_memory() -> None:
    """Give back what nothing refers to any more, so that another process can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_in_fresh_process(job: JobConfig, device: torch.device, figures: Figures) -> None:
    """Fill in the figures of the checkpoint, by ``nanoquant evaluate`` in a process of its own.

    Raises:
        ValueError: that process failed; it has said why.
    """
    folder = Path(job.output)
    flags = []
    if job.evaluation is not None:
        data = job.evaluation
        flags += ["--text", data.text, "--windows", str(data.windows), "--length", str(data.length)]
    if job.sample is not None:
        flags += [f"--sample={job.sample}", "--sample-tokens", str(job.sample_tokens)]
    if not flags:
        return
    with TemporaryDirectory() as temporary:
        file = Path(temporary, "figures.json")
        command = [sys.executable, "-m", "nanoquant", "evaluate", str(folder), *flags]
        command += ["--dense", "none", "--device", device.type, "--json", str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise ValueError(
                f"the checkpoint {folder} is written, but measuring it in a fresh process failed "
                f"with exit code {done.returncode}"
            )
        found = json.loads(file.read_text(encoding="utf-8"))
    figures.perplexity = found["results"].get("text", {}).get("perplexity")
    figures.sample = found["sample"]


def recipe_of(job: JobConfig, report: QuantizationReport) -> dict[str, Any]:
    """How the checkpoint was made, for its config.json."""
    return {
        "source": job.source,
        "text": job.text,
        "bits": report.bits,
        "config": report.config,
        "seconds": report.seconds,
        "versions": versions(),
    }
