"""What the commands show: a bar for each phase, tables, JSON, and no chatter of other libraries."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoquant.output_folder import check_writable
from nanoquant.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
QUIET_LOGGERS = (
    "torchao",
    "torch.utils._pytree",
    "transformers",
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "huggingface_hub",
    "datasets",
)
QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def quiet() -> None:
    """Silence other libraries for this process, best before they are imported.

    A variable that the user has set in the environment stays as it is.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def show_logs(verbose: bool) -> None:
    """Show the library's own warnings, and with ``verbose`` its line per block, above the bars."""
    logger = logging.getLogger("nanoquant")
    logger.handlers = [_AboveBars()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False
    from nanoquant.processes import first  # torch, which help does without

    if not first():  # that one says the same
        logger.setLevel(logging.ERROR)


class _AboveBars(logging.Handler):
    """Writes log records to stderr without breaking a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        note(f"{level}{record.getMessage()}")


def say(text: str = "", end: str = "\n") -> None:
    """Write a line of the result to stdout, or with another ``end`` a piece of one."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line about the work to stderr, above a bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"nanoquant: {text}", file=sys.stderr)


class ConsoleProgress(Progress):
    """Shows each phase as "phase k of n" with time elapsed and time left, on stderr.

    On a terminal it is a bar, elsewhere a line about every ten seconds.

    Args:
        phases: names of the phases to come, in order.
    """

    def __init__(self, phases: Sequence[str]) -> None:
        super().__init__()
        self.phases = list(phases)
        self.bar: Any = None

    def begin(self, name: str, total: int) -> None:
        """A phase starts; one of 0 or 1 units has no bar."""
        count = f"{self.phases.index(name) + 1} of {len(self.phases)}"
        self.label, self.total, self.done, self.state = f"phase {count}: {name}", total, 0, ""
        self.begun = self.shown = time.monotonic()
        if total < 2:
            note(self.label)
        elif sys.stderr.isatty():
            self.bar = _bar(self.label, total)

    def advance(self, done: int, note: str = "") -> None:
        """``done`` more units are finished; with 0, ``note`` says what begins."""
        self.done, self.state = min(self.done + done, self.total), note or self.state
        if self.bar is not None:
            self.bar.set_postfix_str(self.state, refresh=False)
            self.bar.update(self.done - self.bar.n)
            if not done:
                self.bar.refresh()  # what begins now may take minutes
        elif self.total > 1 and time.monotonic() - self.shown >= SECONDS_BETWEEN_LINES:
            self._line()

    def end(self) -> None:
        """The phase is over."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        elif self.total > 1 and self.done:
            self._line()

    def _line(self) -> None:
        """Write where the phase is as one line."""
        self.shown = time.monotonic()
        elapsed = self.shown - self.begun
        left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
        remaining = f", {left:.0f} s left" if self.done < self.total else ""
        state = f", {self.state}" if self.state else ""
        note(f"{self.label}, {self.done}/{self.total}, {elapsed:.0f} s{remaining}{state}")


def _bar(label: str, total: int) -> Any:  # noqa: ANN401
    """A tqdm bar; tqdm comes with transformers and is imported when it is needed."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {elapsed} elapsed, {remaining} left{postfix}"
    return tqdm(total=total, desc=label, bar_format=form, dynamic_ncols=True, file=sys.stderr)


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Rows of text in columns: the first aligned left, the others right.

    Args:
        rows: equally long rows; all-empty cells make a blank line.
        header: row above, with a line under it; empty for none.
    """
    lines = [list(header), *map(list, rows)] if header else list(map(list, rows))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    if header:
        text.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def check_json_path(file: str | None, flag: str = "--json") -> None:
    """Refuse a file for figures, given with ``flag``, that could not be written at the end.

    Raises:
        ValueError: its folder does not exist or can't be written to, it is a folder, or it exists and is no figures.
    """
    if file is None:
        return
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{flag} {file} is a folder; give a file")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {file}: there is no folder {path.parent}; make it first")
    if path.is_file():  # a pipe would be waited for
        _check_replaceable(path, flag)
    check_writable(path.parent, f"{flag} {file}")


def _check_replaceable(path: Path, flag: str) -> None:
    """Raise ValueError if a file that is to be written over is no figures or picture of an earlier call."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    pictures = (b"\x89PNG", b"%PDF", b"<?xml", b"<svg")
    known = start.startswith(b"{" if flag == "--json" else pictures)
    of_model = path.suffix == ".json" and (path.parent / "config.json").exists()
    if (start and not known) or of_model:
        what = "lies in the folder of a model" if of_model else "holds something else"
        raise ValueError(f"{flag} {path} exists and {what}; give another name, or move it away")
