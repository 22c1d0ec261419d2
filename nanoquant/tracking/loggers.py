"""Records to Lightning's loggers: CSV beside the run, and TensorBoard or Weights & Biases when asked for."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanoquant.tracking.dashboard import WandbSink
from nanoquant.tracking.folder import RunFolder
from nanoquant.tracking.layout import Layout
from nanoquant.tracking.sinks import Sink, one_line

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

logger = logging.getLogger(__name__)

NEEDED = {"csv": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Loggers, and modules of which each needs one."""


def check_logger(name: str) -> None:
    """Refuse a logger that is unknown or not installed.

    Raises:
        ValueError: says what to install.
    """
    if name not in NEEDED:
        raise ValueError(f"logger must be one of {', '.join(NEEDED)}, got {name!r}")
    needed = NEEDED[name]
    if needed and not any(map(_is_there, needed)):
        raise ValueError(
            f"--logger {name} needs the package {needed[0]}, which is not installed: "
            f"pip install {needed[0]}, or take --logger csv"
        )


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class SeriesSink:
    """Passes series to any logger of Lightning, over the step of each record.

    Args:
        name: for messages.
        logger: takes ``log_metrics(values, step)``.
    """

    def __init__(self, name: str, logger: Logger) -> None:
        self.name, self.logger, self.layout = name, logger, Layout()

    def record(self, record: dict[str, Any]) -> None:
        """Log the points of a record."""
        for point in self.layout.points(record):
            self.logger.log_metrics(point.values, step=point.at)

    def flush(self) -> None:
        """Write what is buffered."""
        self.logger.save()

    def finish(self, run: dict[str, Any]) -> None:
        """Log what only the end tells, and close."""
        for point in self.layout.after_model():
            self.logger.log_metrics(point.values, step=point.at)
        self.logger.finalize("success" if run["status"] == "finished" else "failed")


def make_sinks(name: str, folder: RunFolder) -> list[Sink]:
    """Where the records of a run go besides its metrics.jsonl; one that can't be opened is left out with a warning.

    Args:
        name: one of ``NEEDED``; series are written as CSV with any of them.
        folder: of the run.
    """
    makers = {"csv": csv_sink} | {name: MAKERS[name]}
    sinks = []
    for kind, make in makers.items():
        try:
            sinks.append(make(folder))
        except Exception as error:  # a logger may raise anything, and none is worth the run
            logger.warning("--logger %s does not start and is left out: %s", kind, one_line(error))
    return sinks


def csv_sink(folder: RunFolder) -> SeriesSink:
    """Series as columns of ``csv/metrics.csv`` in the run's folder."""
    from lightning.pytorch.loggers import CSVLogger

    return SeriesSink("the CSV logger", CSVLogger(folder.path, name="csv", version=""))


def tensorboard_sink(folder: RunFolder) -> SeriesSink:
    """Series in ``tensorboard/`` of the run's folder."""
    from lightning.pytorch.loggers import TensorBoardLogger

    made = TensorBoardLogger(folder.path, name="tensorboard", version="")
    return SeriesSink("TensorBoard", made)


MAKERS: dict[str, Callable[[RunFolder], Sink]] = {
    "csv": csv_sink,
    "tensorboard": tensorboard_sink,
    "wandb": WandbSink,
}
