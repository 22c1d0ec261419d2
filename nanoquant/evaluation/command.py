"""The command ``evaluate``: measure one model beside its dense one, or compare what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanoquant.baselines.command import run_baselines, show_records
from nanoquant.baselines.config import BaselineConfig
from nanoquant.benchmark.report import check_plot
from nanoquant.checkpoint_files import QUANT_METHOD, read_json
from nanoquant.commands import sizes_table
from nanoquant.console import ConsoleProgress, check_json_path, note, say, show_logs
from nanoquant.evaluation.compare import check_comparable, compare, compare_table, read_record
from nanoquant.evaluation.protocols import TEXT, fingerprint
from nanoquant.evaluation.record import (
    evaluate_model,
    make_record,
    method_of,
    phase_names,
    prepare_windows,
    result_table,
)
from nanoquant.evaluation.request import EvaluationRequest
from nanoquant.generate import SAMPLE_TOKENS, check_sample, greedy_sample
from nanoquant.json_files import write_json
from nanoquant.sizes import Sizes
from nanoquant.sources import (
    device_of,
    find_model,
    load_model,
    load_tokenizer,
    quantization_method,
    weight_bytes,
)
from nanoquant.verification import Verification

NO_DENSE = "none"


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """Which model is measured, beside which, and what is written."""

    model: str | None = None
    """Folder or Hub name of the model; left out with --compare and --table."""
    dense: str | None = None
    """Dense model for KL, agreement and its own figures; null: the one a checkpoint was made from, if here; or none."""
    compare: list[str] | None = None
    """Records that --json wrote, or models, which are measured first: differences of each from the first one."""
    baselines: str | None = None
    """Baselines to measure on copies of a dense MODEL, separated by commas, or all: int4, awq3, xnor, sign-svd@0.8."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Settings of the baselines."""
    out: str | None = None
    """Folder for a record of each baseline; one whose record is there is not computed again."""
    table: list[str] | None = None
    """Records that --json or --out wrote, as one table in true bits."""
    plot: str | None = None
    """PNG for the Pareto plot, perplexity against stored bytes, of --table or --baselines; needs matplotlib."""
    sample: str | None = None
    """Prompt to continue, greedily."""
    sample_tokens: int = SAMPLE_TOKENS
    """Most new tokens of the sample."""
    verify: bool = False
    """Fail unless a quantized MODEL is whole: tensors present and finite, the linears of its recipe packed, a few
    generated tokens, perplexity on --text below --most-perplexity."""
    most_perplexity: float | None = None
    """Perplexity on --text up to which --verify passes; null: the vocabulary's size, which is guessing evenly."""
    device: str = "auto"
    """auto takes a GPU if there is one; cpu or cuda."""
    json: str | None = None
    """File for the record, every printed figure in it."""

    def __post_init__(self) -> None:
        given = [what for what in (self.model, self.compare, self.table) if what is not None]
        if len(given) != 1:
            raise ValueError(
                "give one MODEL to measure it, or --compare A B to compare two or more, or --table A B"
            )
        if self.baselines is None and self.out is not None:
            raise ValueError("--out is for --baselines; the record of one model goes to --json")
        if self.baselines is None and self.table is None and self.plot is not None:
            raise ValueError("--plot is for --table or --baselines")
        if self.baselines is not None and (self.model is None or self.sample is not None):
            raise ValueError("--baselines is about one dense MODEL, without --sample")
        if self.compare is not None:
            if len(self.compare) < 2:
                raise ValueError(f"--compare needs two records or models, got {self.compare}")
            if self.sample is not None:
                raise ValueError("--sample is about one model; leave it out with --compare")
        if self.verify and (self.model is None or self.baselines is not None):
            raise ValueError("--verify is about one quantized MODEL")
        if self.sample is not None:
            check_sample(self.sample, self.sample_tokens)


def evaluate_command(job: EvaluationJob, request: EvaluationRequest) -> None:
    """Print what a model measures, or how models differ, and write it as JSON.

    Raises:
        ValueError: nothing to do, or a folder, text, data set, record or prompt is not usable.
    """
    check_json_path(job.json)
    check_json_path(job.plot, "--plot")
    if job.plot is not None:
        check_plot()
    show_logs(verbose=False)
    if job.table is not None:
        write_json(job.json, show_records(job.table, job.plot))
        return
    if job.baselines is not None:
        found = run_baselines(
            str(job.model), job.baselines, job.baseline, request, job.device, job.out, job.plot
        )
        write_json(job.json, found)
        return
    if job.compare is not None:
        write_json(job.json, _compare(job, request))
        return
    if request.empty and job.sample is None and not job.verify:
        raise ValueError(
            "nothing to measure: give --text, --protocol, --zero-shot, --sample or --verify"
        )
    record = (_verified if job.verify else measure_folder)(job, request, job.json)
    if record["sample"] is not None:
        say(f"sample: {job.sample}{record['sample']}")
    say(sizes_table(Sizes(**record["bits"]), record["file_bytes"]))


def measure_folder(
    job: EvaluationJob,
    request: EvaluationRequest,
    file: str | None,
    verification: Verification | None = None,
) -> dict[str, Any]:
    """The record of a model in a folder; prints its figures as they come, and keeps them in ``file``.

    With ``verification`` the model has to pass it.

    Raises:
        ValueError: as :func:`evaluate_command`.
    """
    folder, device = find_model(str(job.model)), device_of(job.device)
    tokenizer = load_tokenizer(folder)
    dense_folder = None if request.empty else find_dense(folder, job.dense)
    if dense_folder is not None and not _same_tokenizer(dense_folder, tokenizer):
        raise ValueError(
            f"{dense_folder} and {folder} have other tokenizers; give --dense the model it came from, or none"
        )
    model_type = read_json(folder / "config.json").get("model_type", "")
    windows = prepare_windows(request, tokenizer, model_type)
    progress = ConsoleProgress(_phases(job, request, dense_folder is not None))
    load = load_model if verification is None else verification.load
    with progress.phase("load", 1):
        model = load(folder, device)
        dense = None if dense_folder is None else load_model(dense_folder, device)
    record = partial(
        make_record,
        model=model,
        tokenizer=tokenizer,
        name=str(job.model),
        method=method_of(folder),
        file_bytes=weight_bytes(folder),
        seed=request.seed,
        dense_name=None if dense_folder is None else str(dense_folder),
    )

    def keep(measured: dict[str, Any]) -> None:
        so_far = record(measured, seconds=progress.seconds)
        name, results = list(so_far["results"].items())[-1]
        say(result_line(name, results, so_far["protocols"][name]))
        write_json(file, so_far | {"sample": None})

    measured = evaluate_model(
        model, tokenizer, request, dense, progress=progress, windows=windows, keep=keep
    )
    sample, asked = None, (model, tokenizer, job.sample, job.sample_tokens)
    if job.sample is not None or verification is not None:
        with progress.phase("sample", 1):
            sample = (greedy_sample if verification is None else verification.generate)(*asked)
    found = record(measured, seconds=progress.seconds) | {"sample": sample}
    if measured["results"]:
        say(f"\n{result_table(found)}\n")
    write_json(file, found)
    return found


def _verified(job: EvaluationJob, request: EvaluationRequest, file: str | None) -> dict[str, Any]:
    """The record of a model that has to pass its verification, which is in ``file`` also where it does not."""
    verification, record = Verification(), {}
    try:
        record = measure_folder(job, request, file, verification)
        verification.guard(record["results"].get(TEXT, {}).get("perplexity"), job.most_perplexity)
    except BaseException as error:
        verification.fail("measure", error)
        raise
    finally:
        record["verification"] = verification.to_list()
        write_json(file, record)
        say(verification.line())
    return record


def find_dense(folder: Path, name: str | None) -> Path | None:
    """Folder of the dense model that goes beside a model.

    Args:
        folder: of the model.
        name: as --dense has it: a model, "none", or null for the one that a checkpoint names if it is a folder here.

    Raises:
        ValueError: the model that was named is not usable.
    """
    if name == NO_DENSE:
        return None
    if name is not None:
        return find_model(name)
    if quantization_method(folder) != QUANT_METHOD:
        return None
    recipe = read_json(folder / "config.json")["quantization_config"].get("recipe") or {}
    source = recipe.get("source")
    if source is not None and Path(source).is_dir():
        return find_model(source)
    note(f"the dense model {source or ''} is not here; --dense FOLDER puts its figures beside")
    return None


def result_line(name: str, results: dict[str, Any], settings: dict[str, Any]) -> str:
    """What one protocol or task gave, in words."""
    if "perplexity" not in results:
        rows = f"{results['questions']:,} questions of the {settings['split']} split"
        return f"{name}: acc {results['acc']:.4f} on {rows}"
    where = "" if name == TEXT else f" of {name}"
    return (
        f"perplexity {results['perplexity']:.4f} on {results['tokens']:,} tokens of "
        f"{results['windows']} windows{where}"
    )


def _compare(job: EvaluationJob, request: EvaluationRequest) -> dict[str, Any]:
    """Read or measure all records, print their differences."""
    names = list(job.compare or [])
    folders = [name for name in names if not Path(name).is_file()]
    if folders and request.empty:
        raise ValueError(
            f"{folders[0]} is no record but a model, which has to be measured: give --text, --protocol or "
            "--zero-shot, or its record"
        )
    records = [None if name in folders else read_record(name) for name in names]
    known = next(((n, r) for n, r in zip(names, records, strict=True) if r is not None), None)
    for name in folders:  # all are refused before one is measured
        known = _check_folder(name, request, known)
    for index, name in enumerate(names):
        if records[index] is None:
            say(name)
            one = replace(job, model=name, compare=None)
            records[index] = measure_folder(one, request, None)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    found = compare(names, [record for record in records if record is not None])
    for line in found["left_out"]:
        note(line)
    say(compare_table(found))
    measured = dict(zip(names, records, strict=True))
    return found | {"records": {name: measured[name] for name in folders}}


def _check_folder(
    name: str, request: EvaluationRequest, known: tuple[str, dict[str, Any]] | None
) -> tuple[str, dict[str, Any]]:
    """Refuse a model that could not be compared with a known record by its perplexities; what is known now."""
    folder = find_model(name)
    tokenizer = load_tokenizer(folder)
    model_type = read_json(folder / "config.json").get("model_type", "")
    windows = prepare_windows(request, tokenizer, model_type)
    settings = {prepared.name: prepared.settings for prepared in windows}
    one = {"protocols": settings, "tokenizer": fingerprint(tokenizer)}
    if known is None:
        return name, one
    if set(settings) & set(known[1]["protocols"]):
        check_comparable((known[0], name), (known[1], one))
    return known


def _phases(job: EvaluationJob, request: EvaluationRequest, dense: bool) -> list[str]:
    """Names of the phases, in order."""
    sample = ["sample"] if job.sample is not None or job.verify else []
    return ["load", *phase_names(request, dense), *sample]


def _same_tokenizer(folder: Path, tokenizer: Any) -> bool:  # noqa: ANN401
    """Whether the tokenizer of a folder gives the same ids as another one."""
    return fingerprint(load_tokenizer(folder))["sha256"] == fingerprint(tokenizer)["sha256"]
