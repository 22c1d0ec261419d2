"""The evaluation record: what was measured, by which protocols, and the dense model's figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoquant.checkpoint_files import QUANT_METHOD
from nanoquant.console import table
from nanoquant.evaluation.agreement import Agreement, agreement
from nanoquant.evaluation.perplexity import Perplexity, check_length, perplexity
from nanoquant.evaluation.protocols import TEXT, Prepared, fingerprint, prepare, prepare_text
from nanoquant.evaluation.request import EvaluationRequest
from nanoquant.evaluation.zero_shot import check_tasks, mean_accuracy, zero_shot
from nanoquant.progress import Progress
from nanoquant.recipe import versions
from nanoquant.sizes import measure_sizes
from nanoquant.sources import quantization_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
DENSE = "dense"
DENSE_LABEL = "dense "

Keep = Callable[[dict[str, Any]], None]


@dataclass
class Measured:
    """Settings by protocol, results by protocol, and those of the dense model."""

    protocols: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Any] | None = None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EvaluationRequest,
    dense: PreTrainedModel | None = None,
    dense_results: dict[str, Any] | None = None,
    progress: Progress | None = None,
    windows: Sequence[Prepared] | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Measure a model that is in memory, however it was made.

    Args:
        model: causal language model.
        tokenizer: of the model, and of the dense one.
        request: what is measured.
        dense: the dense model; adds KL divergence, top-1 agreement and the dense figures.
        dense_results: the "dense" part of an earlier call with the same request; tasks are not run on the dense
            model again, and without a dense model it is taken over as it is.
        progress: has a phase for every protocol and task, see :func:`phase_names`.
        windows: of :func:`prepare_windows`, if they are there already.
        keep: called with what is measured until then after every protocol and task, so that none is lost.

    Returns:
        "protocols", "results" and "dense" of the record.

    Raises:
        ValueError: a text, a data set, the harness or a model does not allow it.
    """
    progress = progress or Progress()
    if windows is None:
        windows = prepare_windows(request, tokenizer, model.config.model_type)
    for prepared in windows:
        check_length(model, prepared.windows.shape[1])
    beside = None if dense is None and dense_results is None else dict(dense_results or {})
    measured = Measured(dense=beside)
    steps: list[Callable[[], None]] = [
        partial(_perplexity, model, dense, prepared, measured, progress) for prepared in windows
    ]
    steps += [
        partial(_task, model, dense, tokenizer, request, name, measured, progress)
        for name in request.tasks
    ]
    for step in steps:
        step()
        if keep is not None:
            keep(vars(measured))
    return vars(measured)


def prepare_windows(
    request: EvaluationRequest, tokenizer: PreTrainedTokenizerBase, model_type: str
) -> list[Prepared]:
    """Windows of every perplexity protocol; refuses tasks that can't run as well, before any work.

    Args:
        request: what is measured.
        tokenizer: of the model.
        model_type: of the model's config.
    """
    check_tasks(request.tasks, request.data)
    return [
        prepare_text(request.text_data, request.bos, tokenizer)
        if name == TEXT
        else prepare(name, request.bos, tokenizer, model_type, request.data)
        for name in request.protocols
    ]


def phase_names(request: EvaluationRequest, dense: bool) -> list[str]:
    """Phases of :func:`evaluate_model`, in order."""
    labels = ["", DENSE_LABEL] if dense else [""]
    return request.protocols + [f"{label}{name}" for name in request.tasks for label in labels]


def make_record(
    measured: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    method: str,
    file_bytes: int,
    seed: int | None,
    seconds: dict[str, float],
    dense_name: str | None = None,
) -> dict[str, Any]:
    """The whole record, plain values for JSON.

    Args:
        measured: of :func:`evaluate_model`.
        model: the model that was measured; for its four sizes.
        tokenizer: of the model.
        name: of the model, as the user gave it.
        method: "dense", "nanoquant" or the name of a baseline.
        file_bytes: bytes of its weight files.
        seed: of the request; None where it took windows in order.
        seconds: by phase.
        dense_name: of the dense model, as the user gave it.
    """
    means = {"model": mean_accuracy(measured["results"])}
    means[DENSE] = None if measured["dense"] is None else mean_accuracy(measured["dense"])
    return {
        "format": FORMAT,
        "model": name,
        "method": method,
        **measured,
        "dense_model": dense_name,
        "zero_shot_mean": means,
        "bits": measure_sizes(model).to_dict(),
        "file_bytes": file_bytes,
        "tokenizer": fingerprint(tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "versions": versions(),
        "seconds": seconds,
    }


def method_of(folder: Path) -> str:
    """What made the model of a folder, for its record."""
    method = quantization_method(folder)
    return DENSE if method is None else "nanoquant" if method == QUANT_METHOD else method


def result_table(record: dict[str, Any]) -> str:
    """The figures of a record, the dense model's beside them; empty without any."""
    beside = record["dense"]
    header = ["", record["method"]] + ([DENSE] if beside is not None else [])
    rows = []
    for name, results in record["results"].items():
        both = [results] + ([beside.get(name, {})] if beside is not None else [])
        for label, key, form in _ROWS:
            if results.get(key) is not None:
                cells = [_cell(one.get(key), one.get(f"{key}_stderr"), form) for one in both]
                rows.append([f"{name}, {label}", *cells])
    mean = record["zero_shot_mean"]
    if mean["model"] is not None:
        both = [mean["model"]] + ([mean[DENSE] or {}] if beside is not None else [])
        cells = [_cell(one.get("acc"), one.get("acc_stderr"), ".4f") for one in both]
        rows.append([f"mean of {len(mean['model']['tasks'])} tasks, acc", *cells])
    return table(rows, header=header) if rows else ""


_ROWS = (
    ("perplexity", "perplexity", ".4f"),
    ("KL from dense, nats per token", "kl", ".4f"),
    ("same first choice as dense", "top1", ".4f"),
    ("acc", "acc", ".4f"),
    ("acc_norm", "acc_norm", ".4f"),
)


def _cell(value: float | None, error: float | None, form: str) -> str:
    """A figure with its standard error; "-" for one that there is not."""
    if value is None:
        return "-"
    return format(value, form) + ("" if error is None else f" +- {format(error, form)}")


def _perplexity(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    prepared: Prepared,
    measured: Measured,
    progress: Progress,
) -> None:
    """Measure one protocol, and the dense model in the same passes."""
    measured.protocols[prepared.name] = prepared.settings
    with progress.phase(prepared.name, len(prepared.windows)):
        if dense is None:
            found = _figures(perplexity(model, prepared.windows, progress=progress.step))
        else:
            both = agreement(model, dense, prepared.windows, progress.step)
            found = _figures(both.model) | _against_dense(both)
            measured.dense[prepared.name] = _figures(both.dense)
    measured.results[prepared.name] = found


def _task(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    request: EvaluationRequest,
    name: str,
    measured: Measured,
    progress: Progress,
) -> None:
    """Run one zero-shot task, on the dense model too unless its results are there."""
    run = partial(
        zero_shot,
        tokenizer=tokenizer,
        names=[name],
        questions=request.questions,
        batch=request.batch,
        softmax_dtype=request.softmax_dtype,
        data=request.data,
        progress=progress,
    )
    measured.protocols[name], measured.results[name] = run(model)[name]
    if dense is not None and name not in measured.dense:
        measured.dense[name] = run(dense, label=DENSE_LABEL)[name][1]


def _figures(result: Perplexity) -> dict[str, Any]:
    """Perplexity of all windows, nats per token of each."""
    per_window = result.nll * result.windows / result.tokens  # (N,) nats per predicted token
    return {
        "perplexity": result.value,
        "nll_per_token": per_window.mean().item(),
        "nll_per_token_stderr": _stderr(per_window),
        "tokens": result.tokens,
        "windows": result.windows,
        "per_window": per_window.tolist(),
    }


def _against_dense(found: Agreement) -> dict[str, Any]:
    """Mean divergence and agreement, their standard errors over windows, and those of each window."""
    return {
        "kl": found.kl.mean().item(),
        "kl_stderr": _stderr(found.kl),
        "top1": found.top1.mean().item(),
        "top1_stderr": _stderr(found.top1),
        "per_window_kl": found.kl.tolist(),
        "per_window_top1": found.top1.tolist(),
    }


def _stderr(values: Tensor) -> float | None:
    """Standard error of a mean over windows (N,); None for one."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
