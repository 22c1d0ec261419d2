"""RunFolder: ``OUT.run`` beside the checkpoint OUT, with run.json and metrics.jsonl.

run.json is replaced whole; metrics.jsonl grows by lines and is flushed about every second, so a run that is killed
leaves what it knew, at worst with a torn last line. Nothing here fails a run: a disk that refuses is named once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nanoquant.json_files import finite, parse_json, read_text, write_json
from nanoquant.tensor_file import forget_torn
from nanoquant.unfinished import PATTERN

logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".run"
RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
KEPT = ("self_text*.safetensors", "sensitivity*.json", PATTERN)
"""Files that the next run of the same output goes on with."""
SECONDS_BETWEEN_FLUSHES = 1.0


def run_folder(output: str | Path) -> Path:
    """Where the record of the checkpoint ``output`` lies: beside it."""
    path = Path(output).absolute()
    if not path.name:
        raise ValueError(
            f"{str(output)!r} can't be the folder of a checkpoint; name a folder in it"
        )
    return path.with_name(path.name + SUFFIX)


def make_way(folder: Path) -> dict[str, Any]:
    """Move the record of an earlier run of the same output away, so that nothing is overwritten.

    Text that the model wrote and measured sensitivities stay: the next run goes on with them.

    Returns:
        Its run.json; empty where there is none that can be read.
    """
    if not (folder / RUN_FILE).exists() and not (folder / METRICS_FILE).exists():
        return {}
    earlier = read_run(folder)
    number = 1
    while (free := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    for partial in folder.glob("*.partial"):
        partial.unlink()
    forget_torn(folder)
    free.mkdir()
    moved = [path for path in folder.iterdir() if not any(path.match(kept) for kept in KEPT)]
    for path in sorted(
        moved, key=lambda path: path.name == RUN_FILE
    ):  # killed here, the next run goes on
        path.rename(free / path.name)
    return earlier


def read_run(folder: Path) -> dict[str, Any]:
    """Content of run.json; empty where it is absent or damaged."""
    try:
        content = parse_json(read_text(folder / RUN_FILE))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class RunFolder:
    """Writes the record of one run.

    Args:
        path: of the folder; made here, after an earlier record has been moved away.
        about: first content of run.json besides its format.
        anew: False goes on with the record that is there; ``about`` is all of it.
    """

    def __init__(self, path: Path, about: dict[str, Any], anew: bool = True) -> None:
        self.path, self.content = path, {"format": FORMAT, **about}
        self.earlier: dict[str, Any] = {}
        self.stream: TextIO | None = None
        self.said = False
        self.flushed = time.monotonic()
        with self._excused():
            if anew:
                self.earlier = make_way(path)
            path.mkdir(parents=True, exist_ok=True)
            self.stream = (path / METRICS_FILE).open("w" if anew else "a", encoding="utf-8")
        self.update()

    def update(self, **fields: Any) -> None:  # noqa: ANN401
        """Change fields of run.json; the file is whole before and after."""
        self.content |= fields
        with self._excused():
            self._flush()
            write_json(str(self.path / RUN_FILE), self.content)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.stream is None:
            return
        with self._excused():
            self.stream.write(json.dumps(finite(line)) + "\n")
            if time.monotonic() - self.flushed > SECONDS_BETWEEN_FLUSHES:
                self._flush()

    def close(self) -> None:
        """Write what is left; lines after this are dropped."""
        with self._excused():
            stream, self.stream = self.stream, None
            if stream is not None:
                stream.close()

    def _flush(self) -> None:
        self.flushed = time.monotonic()
        if self.stream is not None:
            self.stream.flush()

    @contextmanager
    def _excused(self) -> Iterator[None]:
        """What the disk refuses is said once, and lines end there; run.json is tried again at each change."""
        try:
            yield
        except OSError as error:
            stream, self.stream = self.stream, None
            if stream is not None:
                with suppress(OSError):  # it tries once more to write what is left
                    stream.close()
            if not self.said:
                logger.warning(
                    "the record of this run in %s is incomplete (%s); the run goes on",
                    self.path,
                    error.strerror or error,
                )
            self.said = True
