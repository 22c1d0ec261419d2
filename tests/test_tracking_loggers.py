"""Loggers: what is missing is said before the run, what fails during it is left out."""

import csv
import importlib.util

import pytest

from nanoquant.tracking import loggers
from nanoquant.tracking.folder import RunFolder, read_run
from nanoquant.tracking.loggers import check_logger, make_sinks
from nanoquant.tracking.tracker import RunTracker, TrackedProgress


class Broken:
    """A sink that fails at the second record."""

    name, calls = "the broken one", 0

    def record(self, record):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("no\nmore")

    def flush(self):
        pass

    finish = None


def test_csv_has_the_series_as_columns(tmp_path):
    folder = RunFolder(tmp_path / "out.run", {})
    tracker = RunTracker(folder, make_sinks("csv", folder))
    progress = TrackedProgress(["load", "model"])
    with progress.phase("load", 1):
        pass
    progress.follow(tracker)
    with tracker.following(), progress.phase("model", 2):
        tracker.record("model", step=0, loss=2.0)
        tracker.record("model", step=1, held_out=1.0, loss=1.5)
    with (folder.path / "csv" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["model/loss"], row["model/held_out"]) for row in rows] == [
        ("0", "2.0", ""),
        ("1", "1.5", "1.0"),
    ]
    run = read_run(folder.path)
    assert run["seconds"].keys() == run["memory_bytes"].keys() == {"load", "model"}
    assert (run["status"], run["error"], run["phase"]) == ("finished", None, None)


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("bad text"), "ValueError: bad text"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_run_that_fails_says_so(error, said, tmp_path):
    tracker = RunTracker(RunFolder(tmp_path / "out.run", {"status": "running"}))
    with pytest.raises(type(error)), tracker.following():
        raise error
    run = read_run(tmp_path / "out.run")
    assert (run["status"], run["error"]) == ("failed", said)


def test_a_logger_that_fails_is_left_out_and_named_once(tmp_path, caplog):
    folder, broken = RunFolder(tmp_path / "out.run", {}), Broken()
    tracker = RunTracker(folder, [broken])
    for step in range(5):
        tracker.record("model", step=step)
    tracker.finish("finished")
    assert len(caplog.records) == 1 and "the broken one is left out" in caplog.text
    assert broken.calls == 2
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_logger_that_does_not_start_leaves_the_others(tmp_path, caplog, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setitem(loggers.MAKERS, "wandb", fail)
    assert len(make_sinks("wandb", RunFolder(tmp_path / "out.run", {}))) == 1
    assert "--logger wandb does not start" in caplog.text and "disk full" in caplog.text


def test_missing_packages_are_named_before_the_run(monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    check_logger("csv")
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"pip install {name}, or take --logger csv"):
            check_logger(name)
    with pytest.raises(ValueError, match="one of csv, tensorboard, wandb, got 'paper'"):
        check_logger("paper")


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))),
    reason="TensorBoard is not installed",
)
def test_tensorboard_gets_the_series(tmp_path):
    folder = RunFolder(tmp_path / "out.run", {})
    tracker = RunTracker(folder, make_sinks("tensorboard", folder))
    tracker.record("model", step=0, loss=2.0)
    tracker.finish("finished")
    (events,) = (folder.path / "tensorboard").glob("events.*")
    assert b"model/loss" in events.read_bytes()
