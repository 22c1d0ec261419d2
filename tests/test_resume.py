"""``nanoquant resume OUT`` goes on with what was killed, from anywhere, and refuses what it can't go on with."""

import json
import re
import shutil

import pytest
from command_line import SMALL, call, refused

from nanoquant.checkpoint import load
from nanoquant.config import PRESETS, NanoQuantConfig

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
    code, out, err = call(capsys, "resume", "new")
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
    assert "nanoquant evaluate new" in refused(capsys, "resume", "new")
