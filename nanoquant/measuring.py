"""Figures of a job: of the dense model in this process, of the checkpoint in one that knows nothing but its folder."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.architectures import decoder_from_structure
from nanoquant.checkpoint_files import read_json
from nanoquant.console import ConsoleProgress
from nanoquant.data import DataConfig, bos_of, load_tokens, make_windows
from nanoquant.decoder import forgetting
from nanoquant.digest import model_digest
from nanoquant.evaluation.perplexity import perplexity
from nanoquant.figures import Figures
from nanoquant.generate import greedy_sample
from nanoquant.job_config import JobConfig
from nanoquant.sizes import measure_sizes
from nanoquant.tensor_file import TensorFile
from nanoquant.unfinished import PATTERN
from nanoquant.verification import Verification


def evaluation_windows(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows (N, T) of a held-out text."""
    tokens = load_tokens(data.text, tokenizer)
    return make_windows(tokens, data.length, data.windows, bos_of(tokenizer), data.seed)


def measure_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor | None,
    job: JobConfig,
    progress: ConsoleProgress,
    file_bytes: int,
    folder: Path | None,
) -> Figures:
    """Figures of the dense model in this process, or those that an unfinished run has left in ``folder``."""
    figures = Figures(file_bytes, measure_sizes(model).to_dict())
    if not job.measures:
        return figures
    file = _kept_figures(model, windows, job, folder)
    with suppress(ValueError):  # of other text: measured anew
        kept = file.values()
        if kept:
            return replace(figures, **kept)
    with progress.phase("measure dense", 0 if windows is None else len(windows)):
        if windows is not None:
            with forgetting(model, decoder_from_structure(model).blocks):
                figures.perplexity = perplexity(model, windows, progress=progress.step).value
        if job.sample is not None:
            figures.sample = greedy_sample(model, tokenizer, job.sample, job.sample_tokens)
    file.write({}, {"perplexity": figures.perplexity, "sample": figures.sample})
    return figures


def _kept_figures(
    model: PreTrainedModel, windows: Tensor | None, job: JobConfig, folder: Path | None
) -> TensorFile:
    """The file of a dense model's figures."""
    text = b"" if windows is None else windows.numpy().tobytes()
    settings = {
        "model": model_digest(model)[:16],
        "text": hashlib.sha256(text).hexdigest()[:16],
        "length": str(job.eval_length),
        "sample": json.dumps([job.sample, job.sample_tokens]),
    }
    path = None if folder is None else folder / PATTERN.replace("*", "dense")
    return TensorFile(path, settings, "figures of the dense model")


def free_memory() -> None:
    """Give back what nothing refers to any more, so that another process can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_in_fresh_process(
    job: JobConfig,
    device: torch.device,
    figures: Figures,
    most_perplexity: float | None,
    verification: Verification,
) -> None:
    """Fill in the figures of the checkpoint and its checks, by ``nanoquant evaluate`` in a process of its own.

    Args:
        job: what is measured.
        device: where.
        figures: of the checkpoint.
        most_perplexity: up to which it passes; None: any.
        verification: takes the checks, those that failed too.

    Raises:
        ValueError: that process failed; it has said why.
    """
    flags = [
        "--verify",
        "--most-perplexity",
        str(most_perplexity or sys.float_info.max),
    ] * job.verify
    if job.evaluation is not None:
        data = job.evaluation
        flags += ["--text", data.text, "--windows", str(data.windows), "--length", str(data.length)]
    if job.sample is not None:
        flags += [f"--sample={job.sample}", "--sample-tokens", str(job.sample_tokens)]
    if not flags:
        return
    with TemporaryDirectory() as temporary:
        file = Path(temporary, "figures.json")
        command = [sys.executable, "-m", "nanoquant", "evaluate", job.output, *flags]
        command += ["--dense", "none", "--device", device.type, "--json", str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        found = read_json(file) if file.is_file() else {}
    verification.checks = Verification(found.get("verification")).checks
    figures.perplexity = found.get("results", {}).get("text", {}).get("perplexity")
    figures.sample = found.get("sample")
    if done.returncode:
        error = ValueError(
            f"the checkpoint {job.output} is written, but verifying and measuring it in a fresh process failed with "
            f"exit code {done.returncode}: see above; nanoquant resume {job.output} does that again"
        )
        verification.fail("process", error)
        raise error
