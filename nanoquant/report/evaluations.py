"""Perplexities to compare: of the run itself, and of evaluation records beside it or named by the user."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoquant.checkpoint_files import read_json
from nanoquant.evaluation.protocols import TEXT
from nanoquant.evaluation.record import FORMAT
from nanoquant.report.measures import measured
from nanoquant.report.run_files import Run, number
from nanoquant.tracking.folder import RUN_FILE

RECORD_KEYS = {"format", "model", "method", "results"}
MOST_BYTES = 64 * 2**20
"""Files beside the run that are larger are no evaluation records."""


@dataclass(frozen=True)
class Point:
    """One model under one protocol."""

    protocol: str
    method: str
    model: str
    bytes: float
    perplexity: float

    @property
    def name(self) -> str:
        """Method and the last part of the model's name."""
        return f"{self.method}, {Path(self.model).name or self.model}"


def own_points(run: Run) -> list[Point]:
    """Dense and quantized model as the run measured them."""
    protocol, points = _own_label(run), []
    for who, method, model in (
        ("dense", "dense", run.text("source")),
        ("quantized", "nanoquant", run.text("output")),
    ):
        size, value = (measured(run, who, key) for key in ("file_bytes", "perplexity"))
        if size is not None and value is not None and value > 0:
            points.append(Point(protocol, method, model or who, size, value))
    return points


def record_points(run: Run, given: list[str]) -> tuple[list[Point], list[str]]:
    """Points of records beside the run that are about its models, and of all that are given.

    Returns:
        Points, and a sentence for each record that has no perplexity or size.

    Raises:
        ValueError: a given file or folder is not there or holds no record.
    """
    records = _found_beside(run)
    for name in given:
        path = Path(name)
        found = _records(path) if path.is_dir() else {path: read_json(path)}
        if not found or not all(RECORD_KEYS <= record.keys() for record in found.values()):
            raise ValueError(
                f"--records {name}: no evaluation record; give a file of nanoquant evaluate --json, or a folder of them"
            )
        for file, record in found.items():
            if record["format"] != FORMAT:
                raise ValueError(
                    f"--records {file} has format {record['format']!r}; this version reads {FORMAT}"
                )
        records |= {file.absolute(): record for file, record in found.items()}
    records = {file: records[file] for file in sorted(records)}
    labels = _labels(run, list(records.values()))
    points, problems = [], []
    for file, record in records.items():
        own = _points(run, record, labels)
        points += own
        if not own:
            problems.append(f"{file.name} has no perplexity with bytes, so it is not in the plot.")
    return points, problems


def _found_beside(run: Run) -> dict[Path, dict[str, Any]]:
    """Records in the run's folder and beside it whose model is that of the run, dense or quantized."""
    models = {_same(run, m) for m in (run.text("source"), run.text("output")) if m}
    return {
        file.absolute(): record
        for folder in (run.folder, run.folder.parent)
        for file, record in _records(folder).items()
        if _same(run, record["model"]) in models or Path(str(record["model"])).name == run.name
    }


def _same(run: Run, model: Any) -> str:  # noqa: ANN401
    """A name under which one model is known: an absolute folder where it is one."""
    path = Path(str(model))
    for folder in (path, run.folder.parent / path):
        if os.path.isdir(folder):  # False as well for names that no system takes
            return str(folder.resolve())
    return str(model)


def _records(folder: Path) -> dict[Path, dict[str, Any]]:
    """Evaluation records of a folder; other files are none of our business."""
    records = {}
    for file in sorted(folder.glob("*.json")):
        if file.name == RUN_FILE or file.stat().st_size > MOST_BYTES:
            continue
        try:
            record = read_json(file)
        except ValueError:
            continue
        if RECORD_KEYS <= record.keys():
            records[file] = record
    return records


def _labels(run: Run, records: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """A label for each protocol and the tokens it was taken on, so that only what compares shares a panel."""
    own, text = _own_label(run), _own_job(run).get("eval_text")
    labels: dict[tuple[str, str], str] = {}
    for record in records:
        for protocol in _object(record["results"]):
            key = _key(record, protocol)
            settings = _object(_object(record.get("protocols")).get(protocol))
            label = _text_of(protocol, settings)
            if {"windows", "length"} <= settings.keys():
                label = _label(label, settings["windows"], settings["length"])
            if key not in labels:
                # the run kept no digest of its tokens: its panel is for the first windows of its text alone
                shared = text == settings.get("source") and settings.get("seed") is None
                taken = [*labels.values(), *([] if shared else [own])]
                number_of = sum(other.startswith(label) for other in taken) + 1
                labels[key] = label if number_of == 1 else f"{label}, settings {number_of}"
    return labels


def _own_job(run: Run) -> dict[str, Any]:
    return _object(run.get("figures", "job") or run.get("job"))


def _own_label(run: Run) -> str:
    """What the run itself measured perplexity on."""
    job = _own_job(run)
    text = Path(str(job.get("eval_text"))).name
    return _label(text, job.get("eval_windows"), job.get("eval_length"))


def _label(text: str, windows: Any, length: Any) -> str:  # noqa: ANN401
    return f"{text}, {windows} windows of {length} tokens"


def _text_of(protocol: str, settings: dict[str, Any]) -> str:
    """The name of a protocol; that of the file where the protocol is any text."""
    source = settings.get("source")
    return Path(source).name if protocol == TEXT and isinstance(source, str) else protocol


def _key(record: dict[str, Any], protocol: str) -> tuple[str, str]:
    """What must agree for two perplexities to compare: the protocol, and its tokens or all its settings."""
    settings = _object(_object(record.get("protocols")).get(protocol))
    tokens = settings.get("tokens_sha256")
    return protocol, json.dumps(settings if tokens is None else tokens, sort_keys=True)


def _object(value: Any) -> dict[str, Any]:  # noqa: ANN401
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _points(run: Run, record: dict[str, Any], labels: dict[tuple[str, str], str]) -> list[Point]:
    """A point for each protocol that gave a perplexity, and the dense model's beside it where its bytes are known."""
    names = str(record["method"]), str(record["model"])
    size = number(record.get("file_bytes"))
    if size is None:
        size = number(_object(record.get("bits")).get("bytes_on_disk"))
    dense_model = str(record.get("dense_model") or "")
    of_run = dense_model and _same(run, dense_model) == _same(run, run.text("source"))
    dense_size = measured(run, "dense", "file_bytes") if of_run else None
    points = []
    for protocol, result in _object(record["results"]).items():
        label = labels[_key(record, protocol)]
        beside = _object(_object(record.get("dense")).get(protocol))
        for who, nbytes, found in (
            (names, size, _object(result)),
            (("dense", dense_model), dense_size, beside),
        ):
            value = number(found.get("perplexity"))
            if value is not None and value > 0 and nbytes is not None:
                points.append(Point(label, *who, nbytes, value))
    return points
