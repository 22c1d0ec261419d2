"""Perplexities to compare: of the run itself, and of evaluation records beside it or named by the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoquant.checkpoint_files import read_json
from nanoquant.report.measures import measured
from nanoquant.report.record import HEAD_FILE, Run, number

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
    job = run.get("figures", "job") or run.get("job") or {}
    job = job if isinstance(job, dict) else {}
    text = Path(str(job.get("eval_text"))).name
    protocol = f"{text}, {job.get('eval_windows')} windows of {job.get('eval_length')} tokens"
    points = []
    for who, method, model in (
        ("dense", "dense", run.text("source")),
        ("quantized", "nanoquant", run.text("output")),
    ):
        size, value = (measured(run, who, key) for key in ("file_bytes", "perplexity"))
        if size is not None and value is not None:
            points.append(Point(protocol, method, model or who, size, value))
    return points


def record_points(run: Run, given: list[str]) -> tuple[list[Point], list[str]]:
    """Points of records beside the run that are about its models, and of all that are given.

    Returns:
        Points, and a sentence for each record that has no perplexity or size.

    Raises:
        ValueError: a given file or folder is not there or holds no record.
    """
    models = {_same(run, run.text("source")), _same(run, run.text("output") or str(run.output))}
    found: dict[Path, dict[str, Any]] = {}
    for folder in (run.folder, run.folder.parent):
        for file, record in _records(folder).items():
            if _same(run, record["model"]) in models:
                found[file.absolute()] = record
    for name in given:
        path = Path(name)
        records = _records(path) if path.is_dir() else {path: read_json(path)}
        if not records or not all(RECORD_KEYS <= record.keys() for record in records.values()):
            raise ValueError(
                f"--records {name}: no evaluation record; give a file of nanoquant evaluate --json, or a folder of them"
            )
        found |= {file.absolute(): record for file, record in records.items()}
    points, problems = [], []
    for file in sorted(found):
        own = _points(found[file])
        points += own
        if not own:
            problems.append(f"{file.name} has no perplexity with bytes, so it is not in the plot.")
    return points, problems


def _same(run: Run, model: Any) -> str:  # noqa: ANN401
    """A name under which one model is known: an absolute folder where it is one."""
    path = Path(str(model))
    for folder in (path, run.folder.parent / path):
        if folder.is_dir():
            return str(folder.resolve())
    return str(model)


def _records(folder: Path) -> dict[Path, dict[str, Any]]:
    """Evaluation records of a folder; other files are none of our business."""
    records = {}
    for file in sorted(folder.glob("*.json")):
        if file.name == HEAD_FILE or file.stat().st_size > MOST_BYTES:
            continue
        try:
            record = read_json(file)
        except ValueError:
            continue
        if RECORD_KEYS <= record.keys():
            records[file] = record
    return records


def _points(record: dict[str, Any]) -> list[Point]:
    """A point for each protocol that gave a perplexity."""
    size, results = number(record.get("file_bytes")), record["results"]
    points = []
    for protocol, result in results.items() if isinstance(results, dict) else ():
        value = number(result.get("perplexity")) if isinstance(result, dict) else None
        if value is not None and size is not None:
            names = str(record["method"]), str(record["model"])
            points.append(Point(str(protocol), *names, size, value))
    return points
