"""Zero-shot accuracy by lm-evaluation-harness: its own tasks, prompts, metrics and model class.

Only two things are ours: the model is one that is already loaded, and the rows may come from a local folder. The
harness is imported when a task runs. By default it takes log-probabilities in the model's own dtype, so that those
of a bfloat16 model are rounded; published scores have that too.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from nanoquant.evaluation.local_data import find_files, read_rows
from nanoquant.evaluation.tasks import TASKS
from nanoquant.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = (
    "zero-shot tasks run through lm-evaluation-harness, which is not installed: pip install 'nanoquant[eval]', "
    "or pip install 'lm-eval>=0.4.13'"
)


def check_tasks(names: Sequence[str], data: str | None) -> None:
    """Look before any work whether tasks can run.

    Raises:
        ValueError: the harness is not installed, or local rows are not there or lack columns.
    """
    if names and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    for name in names if data is not None else ():
        _, files = find_files(data, TASKS[name].folders, TASKS[name].splits)
        next(read_rows(files, TASKS[name].columns, f"the task {name}"), None)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    questions: int | None = None,
    batch: int = 1,
    softmax_dtype: str | None = None,
    data: str | None = None,
    progress: Progress | None = None,
    label: str = "",
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Score a model on tasks, without examples in the prompt.

    Args:
        model: causal language model, in evaluation mode.
        tokenizer: of the model; it is not changed.
        names: keys of ``TASKS``.
        questions: only the first of every task; None takes all.
        batch: most sequences in one forward pass.
        softmax_dtype: of the log-probabilities; None takes the model's own, as the harness does by default.
        data: local folder with the rows; None lets the harness fetch its own.
        progress: has a phase for every task.
        label: what stands before the task in the name of its phase.

    Returns:
        For every task its settings and its results: acc and acc_norm (None where the task has none) with their
        standard errors, and correctness by question.

    Raises:
        ValueError: the harness is not installed, or the rows are not there or lack columns.
    """
    check_tasks(names, data)
    progress = progress or Progress()
    found = {}
    with TemporaryDirectory(prefix="nanoquant-") as folder, _hushed() as stderr:
        scorer = _scorer(model, tokenizer, batch, softmax_dtype, progress, stderr)
        for name in names:
            scorer.phase = f"{label}{name}"
            task, split = _load_task(name, data, Path(folder))
            settings, results = _score(scorer, name, task, questions)
            own = {"split": split, "batch": batch, "softmax_dtype": softmax_dtype, "data": data}
            found[name] = settings | own, results
    return found


def mean_accuracy(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Mean of acc over the zero-shot tasks among results, and its standard error; None without tasks.

    Tasks weigh the same, however many questions they have; their errors are independent.
    """
    tasks = [name for name in results if name in TASKS]
    if not tasks:
        return None
    errors = [results[name]["acc_stderr"] for name in tasks]
    return {
        "acc": math.fsum(results[name]["acc"] for name in tasks) / len(tasks),
        "acc_stderr": math.sqrt(math.fsum(error**2 for error in errors)) / len(tasks),
        "tasks": tasks,
    }


def _load_task(name: str, data: str | None, folder: Path) -> tuple[Any, str]:
    """The harness's own definition of a task, reading local rows where there are some; and the split it scores.

    Args:
        name: key of ``TASKS``.
        data: local folder, or None.
        folder: for a file that includes the definition, and for what the datasets library writes.
    """
    import lm_eval.tasks

    task = TASKS[name]
    definition = Path(lm_eval.tasks.__file__).parent / task.definition
    lines: dict[str, Any] = {"include": str(definition), "task": name}
    split = task.splits[0]
    if data is not None:
        split, files = find_files(data, task.folders, task.splits)
        lines |= _local_rows(name, split, files, folder)
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / f"{name}.yaml").write_text(json.dumps(lines), encoding="utf-8")  # JSON is YAML
    manager = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)
    try:
        loaded = manager.load([name])["tasks"][name]
    except Exception as error:  # the datasets library and the network have families of their own
        hint = f"give --data DIR with its rows in DIR/{task.folders[0]}" if data is None else data
        raise ValueError(
            f"{name} can't be loaded: {type(error).__name__}: {error}; {hint}"
        ) from error
    loaded.set_config("num_fewshot", 0)
    return loaded, split


def _local_rows(name: str, split: str, files: list[Path], folder: Path) -> dict[str, Any]:
    """Write the needed columns of local files where the harness can read them; settings that point there."""
    task = TASKS[name]
    rows = folder / f"{name}-{split}.jsonl"
    with rows.open("w", encoding="utf-8") as out:
        for row in read_rows(files, task.columns, f"the task {name}"):
            out.write(json.dumps(row) + "\n")
    splits = {f"{kind}_split": kind if kind == split else None for kind in ("validation", "test")}
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(rows)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        **splits,
    }


def _score(
    scorer: Any,  # noqa: ANN401
    name: str,
    task: Any,  # noqa: ANN401
    questions: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and results of one task."""
    import lm_eval
    from lm_eval.evaluator import evaluate

    done = evaluate(
        lm=scorer,
        task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=questions,
        log_samples=True,
    )
    figures = done["results"][name]
    samples = sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] for sample in samples)
    settings = {
        "version": done["versions"][name],
        "harness": lm_eval.__version__,
        "fewshot": 0,
        "questions": len(samples),
        "of": len(task.eval_docs),
        "questions_sha256": hashlib.sha256(hashes.encode()).hexdigest()[:32],
    }
    results: dict[str, Any] = {"questions": len(samples)}
    for metric in ("acc", "acc_norm"):
        results[metric] = figures.get(f"{metric},none")
        results[f"{metric}_stderr"] = figures.get(f"{metric}_stderr,none")
    results["per_question"] = [int(sample["acc"]) for sample in samples]
    if results["acc_norm"] is not None:
        results["per_question_norm"] = [int(sample["acc_norm"]) for sample in samples]
    return settings, results


def _scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    softmax_dtype: str | None,
    progress: Progress,
    stderr: TextIO,
) -> Any:  # noqa: ANN401
    """The harness's model class around a loaded model, showing our progress instead of its own."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):
        """HFLM that reports every scored sequence to a phase."""

        phase = ""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            """Log-likelihoods of the requests; the harness calls it once a task."""
            with contextlib.redirect_stderr(stderr), progress.phase(self.phase, len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

    own = copy.deepcopy(tokenizer)  # the harness sets its pad token
    scorer = Scorer(pretrained=model, tokenizer=own, batch_size=batch, softmax_dtype=softmax_dtype)
    scorer.cache_hook = _Counter(progress)
    return scorer


class _Counter:
    """Takes the harness's notes of finished sequences, meant for its cache, and counts them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def add_partial(self, *_: object) -> None:
        """One more sequence is scored."""
        self.progress.advance(1)


@contextlib.contextmanager
def _hushed() -> Iterator[TextIO]:
    """Without the harness's own log and bars, which go to stderr; yields the real one."""
    logger, stderr = logging.getLogger("lm_eval"), sys.stderr
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield stderr
    finally:
        logger.setLevel(level)
