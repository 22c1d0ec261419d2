"""``nanoquant resume OUT`` goes on with what was killed, from anywhere, and refuses what it can't go on with."""

import json
import re

import pytest
from command_line import SMALL, call, refused

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
