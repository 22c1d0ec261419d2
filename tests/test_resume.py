"""``nanoquant resume OUT`` goes on with what was killed, from anywhere, and refuses what it can't go on with."""

import json
import math
import re
import shutil
import time

import pytest
from command_line import SMALL, call, refused

from nanoquant.checkpoint import load
from nanoquant.config import PRESETS, NanoQuantConfig
from nanoquant.training import RunConfig

pytestmark = pytest.mark.usefixtures("untouched_process")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_survives_json(preset):
    config = PRESETS[preset]()
    assert NanoQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_takes_defaults_for_what_is_left_out_and_no_other_fields():
    config = NanoQuantConfig.from_dict({"budget": {"bits": 0.8}})
    assert config == NanoQuantConfig(budget=type(config.budget)(bits=0.8))
    with pytest.raises(TypeError, match="iterationz"):
        NanoQuantConfig.from_dict({"admm": {"iterationz": 3}})
    with pytest.raises(ValueError, match="bits"):
        NanoQuantConfig.from_dict({"budget": {"bits": -1}})


def interrupted(place, tmp_path, capsys, monkeypatch):
    """A run of which everything but the checkpoint is done, started in the folder of the model."""

    def interrupt(*arguments, **flags):
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    command = ["quantize", "dense", tmp_path / "new", "--text", "text.txt", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("nanoquant.job.save_pretrained", interrupt)
        assert call(capsys, *command)[0] == 130
    monkeypatch.chdir(tmp_path)


def test_a_killed_run_goes_on_from_another_directory_and_only_once(
    place, tmp_path, capsys, monkeypatch
):
    interrupted(place, tmp_path, capsys, monkeypatch)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    code, out, err = call(capsys, "resume", "link/new")
    assert code == 0 and "bits per weight, body" in out
    assert "calibrate" not in err and "blocks" not in err
    assert (tmp_path / "new" / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert "the run of new is finished" in refused(capsys, "resume", "new")


def test_what_can_not_go_on_is_refused(place, tmp_path, capsys, monkeypatch):
    assert "so there is no run of" in refused(capsys, "resume", tmp_path / "new")
    interrupted(place, tmp_path, capsys, monkeypatch)
    file = tmp_path / "new.run" / "run.json"
    record = json.loads(file.read_text())
    for change, words in (
        ({"directory": str(tmp_path / "gone")}, "gone, which is gone; make it again"),
        ({"config": {"speed": 11}}, "not of this version .*speed"),
        ({"job": {"source": "dense"}}, "not of this version .*output"),
    ):
        file.write_text(json.dumps(record | change))
        message = refused(capsys, "resume", "new")
        assert re.search(words, message), message
    file.write_text("{")
    assert "absent or damaged" in refused(capsys, "resume", "new")


def test_a_checkpoint_whose_saving_was_killed_is_made_anew(place, tmp_path, capsys, monkeypatch):
    interrupted(place, tmp_path, capsys, monkeypatch)
    torn = tmp_path / "new"
    (torn / ".partial-abc").mkdir(parents=True)
    (torn / ".partial-abc" / "config.json").write_text("{}")
    (torn / "model.safetensors").write_bytes(b"moved already")
    assert call(capsys, "resume", torn)[0] == 0
    assert sorted(path.name for path in torn.iterdir() if path.name.startswith(".")) == []
    assert load(torn) is not None


def test_a_refused_command_leaves_the_record_of_the_run(place, tmp_path, capsys, monkeypatch):
    interrupted(place, tmp_path, capsys, monkeypatch)
    monkeypatch.chdir(place)
    command = ["quantize", "dense", tmp_path / "new", "--text", "text.txt", *SMALL]
    assert "run.seed '0', not '3'" in refused(capsys, *command, "--run.seed", 3)
    assert not (tmp_path / "new.run-1").exists()
    assert call(capsys, "resume", tmp_path / "new")[0] == 0


def test_a_copied_record_and_a_complete_checkpoint_are_refused(
    place, tmp_path, capsys, monkeypatch
):
    interrupted(place, tmp_path, capsys, monkeypatch)
    shutil.copytree(tmp_path / "new.run", tmp_path / "other.run")
    assert f"is of the run of {tmp_path / 'new'}" in refused(capsys, "resume", "other")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text("{}")
    assert "has a checkpoint, but not that of its record" in refused(capsys, "resume", "new")


@pytest.mark.parametrize(
    "how", ["resume", pytest.param("the same command", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_while_it_measures_does_only_that(
    how, place, tmp_path, capsys, monkeypatch
):
    def interrupt(*arguments, **flags):
        raise KeyboardInterrupt

    figures = tmp_path / "figures.json"
    command = ["quantize", place / "dense", tmp_path / "new", "--text", place / "text.txt"]
    command += [*SMALL[4:], "--verify", "--json", figures]  # less what belongs to signs
    command += "--method product --bits 2.5 --product.codebooks [4,4]".split()  # JSON has no tuple
    with monkeypatch.context() as patch:
        patch.setattr("nanoquant.finish.measure_in_fresh_process", interrupt)
        assert call(capsys, *command)[0] == 130
    record = json.loads((tmp_path / "new.run" / "run.json").read_text())
    assert record["status"] == "failed" and record["unmeasured"]["report"]["ranks"]
    written = (tmp_path / "new" / "model.safetensors").stat().st_mtime_ns
    lines = (tmp_path / "new.run" / "metrics.jsonl").read_text()
    other = [flag if flag != figures else tmp_path / "other.json" for flag in command]
    assert "not empty" in refused(capsys, *other)
    code, out, err = call(capsys, *(command if how != "resume" else ["resume", tmp_path / "new"]))
    assert code == 0 and "verified: " in out and "bits per weight, body" in out
    assert "phase 1 of 1: measure in a fresh process" in err
    record = json.loads((tmp_path / "new.run" / "run.json").read_text())
    assert record["status"] == "finished" and record["unmeasured"] is None
    assert record["figures"] == json.loads(figures.read_text())
    assert record["figures"]["report"]["blocks"] and record["seconds"].keys() >= {"blocks", "save"}
    assert all(check["ok"] for check in record["figures"]["verification"])
    assert (tmp_path / "new" / "model.safetensors").stat().st_mtime_ns == written
    assert (tmp_path / "new.run" / "metrics.jsonl").read_text().startswith(lines)
    assert not (tmp_path / "new.run-1").exists()


def test_another_text_is_refused_before_the_record_is_moved_away(
    place, tmp_path, capsys, monkeypatch
):
    interrupted(place, tmp_path, capsys, monkeypatch)
    (tmp_path / "other.txt").write_text("other words and more of them, again and again\n" * 200)
    before = sorted(path.name for path in (tmp_path / "new.run").iterdir())
    monkeypatch.chdir(place)
    command = ["quantize", "dense", tmp_path / "new", "--text", tmp_path / "other.txt", *SMALL]
    assert "unfinished work of text '" in refused(capsys, *command)
    assert sorted(path.name for path in (tmp_path / "new.run").iterdir()) == before
    assert not (tmp_path / "new.run-1").exists()


def test_what_was_killed_goes_on_within_ten_seconds(place, tmp_path, capsys, monkeypatch):
    interrupted(place, tmp_path, capsys, monkeypatch)
    reached = []

    def stop(*arguments, **flags):
        reached.append(time.monotonic())
        raise KeyboardInterrupt

    monkeypatch.setattr("nanoquant.phases.ModelReconstructor", stop)
    begun = time.monotonic()
    assert call(capsys, "resume", "new")[0] == 130
    assert reached[0] - begun < 10


def test_a_copy_interval_without_end_is_refused_as_json_has_none():
    with pytest.raises(ValueError, match="save_every must be a finite number"):
        RunConfig(save_every=math.inf)
