"""The run folder is whole at every moment, overwrites nothing, and never fails a run."""

import contextlib
import json
import logging
from pathlib import Path

import pytest

from nanoquant.tracking.folder import RunFolder, make_way, read_run, run_folder


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_lies_beside_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("runs/out") == run_folder("runs/out/") == tmp_path / "runs" / "out.run"
    assert run_folder(".") == Path(f"{tmp_path}.run")


def test_changes_replace_the_file_and_lines_follow_in_order(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "out.run", {"status": "running", "seconds": {}})
    assert read_run(folder.path) == {"format": 1, "status": "running", "seconds": {}}
    for step in range(3):
        folder.append({"step": step, "loss": float("nan") if step == 1 else 0.5})
    folder.update(seconds={"load": 1.5})
    assert lines(folder.path)[:2] == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": None}]
    assert read_run(folder.path)["seconds"] == {"load": 1.5}
    folder.close()
    folder.append({"step": 4})
    assert len(lines(folder.path)) == 3
    assert sorted(f.name for f in folder.path.iterdir()) == ["metrics.jsonl", "run.json"]


def test_an_earlier_record_is_renamed_and_known(tmp_path):
    for number in range(3):
        folder = RunFolder(tmp_path / "out.run", {"status": "failed", "number": number})
        folder.append({"number": number})
        folder.close()
    assert folder.earlier["number"] == 1
    found = {path.name: lines(path)[0]["number"] for path in tmp_path.iterdir()}
    assert found == {"out.run-1": 0, "out.run-2": 1, "out.run": 2}


def test_written_text_and_sensitivities_stay_for_the_next_run(tmp_path):
    RunFolder(tmp_path / "out.run", {}).close()
    for name in ("self_text-1.safetensors", "sensitivity.json"):
        (tmp_path / "out.run" / name).write_text("kept")
    RunFolder(tmp_path / "out.run", {}).close()
    names = ["metrics.jsonl", "run.json", "self_text-1.safetensors", "sensitivity.json"]
    assert sorted(f.name for f in (tmp_path / "out.run").iterdir()) == names
    assert sorted(f.name for f in (tmp_path / "out.run-1").iterdir()) == names[:2]


def test_a_damaged_earlier_record_is_renamed_too(tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "run.json").write_text("{")
    assert RunFolder(tmp_path / "out.run", {}).earlier == {}
    assert (tmp_path / "out.run-1" / "run.json").read_text() == "{"


def test_a_file_in_the_way_is_said_once(tmp_path, caplog):
    (tmp_path / "out.run").write_text("mine")
    folder = RunFolder(tmp_path / "out.run", {})
    folder.append({"step": 1})
    folder.update(status="finished")
    folder.close()
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text
    assert (tmp_path / "out.run").read_text() == "mine" and folder.content["status"] == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_once(tmp_path, caplog, monkeypatch):
    folder = RunFolder(tmp_path / "out.run", {"status": "running"})
    folder.stream = Path("/dev/full").open("w")
    monkeypatch.setattr("nanoquant.tracking.folder.SECONDS_BETWEEN_FLUSHES", -1.0)
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            folder.append({"step": step})
        folder.close()
        folder.update(status="finished")
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
    assert read_run(folder.path)["status"] == "finished"


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_making_way_loses_nothing_and_the_next_run_goes_on(
    moved, tmp_path, monkeypatch
):
    path = tmp_path / "out.run"
    RunFolder(path, {})
    (path / "loss.csv").write_text("1")
    (path / "sensitivity-1.json").write_text("{}")
    rename, done = Path.rename, []

    def killed(self, target):
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        make_way(path)
    RunFolder(path, {})
    assert (path / "sensitivity-1.json").exists() and (path / "run.json").exists()
    assert not (path / "loss.csv").exists()
    assert [file.read_text() for file in tmp_path.glob("out.run-*/loss.csv")] == ["1"]
