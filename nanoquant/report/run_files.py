"""What a run left behind: run.json and metrics.jsonl, whole, cut off in the middle or damaged.

Reading never fails on damaged content: what can't be used is left out, and said in ``problems``.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoquant.checkpoint_files import read_json
from nanoquant.json_files import parse_json
from nanoquant.tracking.folder import FORMAT, METRICS_FILE, RUN_FILE, SUFFIX, run_folder

STATES = ("running", "finished", "failed")
LARGEST = 1e100
"""Numbers beyond this measure nothing; they count as not finite."""
PLACES = {"block": int, "step": int, "layer": str, "phase": str}
"""Keys of a metrics line that say where it was taken, and their types; all but phase may be null."""


@dataclass
class Run:
    """A run as far as its files tell."""

    folder: Path
    head: dict[str, Any] = field(default_factory=dict)
    """run.json; empty where it can't be read."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Usable lines of metrics.jsonl in their order."""
    problems: list[str] = field(default_factory=list)
    """What could not be read and why, each a sentence."""

    @property
    def name(self) -> str:
        """Of the checkpoint that the run made or was going to make."""
        return Path(self.text("output") or self.folder.name.removesuffix(SUFFIX)).name

    @property
    def status(self) -> str:
        """running, finished, failed, or unknown."""
        found = self.head.get("status")
        return found if found in STATES else "unknown"

    def get(self, *path: str) -> Any:  # noqa: ANN401
        """A value of run.json by its keys; None where any is missing."""
        value: Any = self.head
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *path: str) -> float | None:
        """A finite number of run.json; None where there is none."""
        return number(self.get(*path))

    def text(self, *path: str) -> str | None:
        """A text of run.json; None where there is none."""
        found = self.get(*path)
        return found if isinstance(found, str) else None

    def having(self, metric: str, phase: str | None = None) -> Iterator[dict[str, Any]]:
        """Rows with a finite number under ``metric``, of one phase or of all."""
        for row in self.rows:
            if number(row.get(metric)) is not None and phase in (None, row["phase"]):
                yield row


def number(value: Any) -> float | None:  # noqa: ANN401
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if abs(float(value)) <= LARGEST else None
    except OverflowError:  # a whole number beyond floats
        return None


def find_run(folder: str) -> Path:
    """The folder of a run, from its own name or that of the checkpoint.

    Raises:
        ValueError: there is none, or it is empty.
    """
    given = Path(folder)
    beside = run_folder(given)
    for path in (given, beside):
        if (path / RUN_FILE).is_file() or (path / METRICS_FILE).is_file():
            return path.absolute()
    what = "a file" if given.is_file() else "no folder of a run" if given.is_dir() else "not there"
    raise ValueError(
        f"{folder} is {what}: neither it nor {beside.name} beside it has {RUN_FILE} or {METRICS_FILE}; "
        "give OUT or OUT.run of nanoquant quantize MODEL OUT"
    )


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        ValueError: the folder has a newer format.
    """
    run = Run(folder)
    try:
        run.head = read_json(folder / RUN_FILE)
    except ValueError as error:
        run.problems.append(f"{error}; status, settings, versions and final figures are unknown.")
    version = run.head.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{folder / RUN_FILE} has format {version}, but this nanoquant reads up to {FORMAT}; upgrade nanoquant"
        )
    _read_rows(run, folder / METRICS_FILE)
    return run


def _read_rows(run: Run, file: Path) -> None:
    """Add the usable lines, and a sentence for each kind of unusable ones."""
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise OSError(errno.EINVAL, "no regular file")
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        run.problems.append(
            f"{METRICS_FILE} can't be read ({error.strerror}); everything over steps and layers is missing."
        )
        return
    unusable = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row(line)
        if row is not None:
            run.rows.append(row)
        elif place == len(lines):  # no line break after it
            run.problems.append(
                f"The last line of {METRICS_FILE} is cut off and left out: the run was ended while it wrote."
            )
        else:
            unusable.append(place)
    if unusable:
        places = ", ".join(map(str, unusable[:5])) + (" and more" if len(unusable) > 5 else "")
        run.problems.append(
            f"{len(unusable)} lines of {METRICS_FILE} are no metrics and left out: {places}."
        )
    _count_lost(run)


def _row(line: bytes) -> dict[str, Any] | None:
    """One line as an object whose places have the right types; None for anything else."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("phase"), str):
        return None
    for key, kind in PLACES.items():
        value = row.setdefault(key, None)
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is int and number(value) is None):
            return None
    return row


def _count_lost(run: Run) -> None:
    """Say which metrics have values that are no finite numbers, so that gaps in plots are explained."""
    lost: Counter[str] = Counter()
    for row in run.rows:
        for key, value in row.items():
            if key not in PLACES and not isinstance(value, list | str) and number(value) is None:
                lost[key] += 1
    if lost:
        named = ", ".join(f"{count} of {key}" for key, count in sorted(lost.items()))
        run.problems.append(
            f"Values that are not finite numbers are left out as gaps: {named}. They are NaN or infinite "
            "where the run computed them."
        )
