"""``nanoquant doctor`` names what would stop a quantization, and says ok where nothing would."""

import json
import shutil

import pytest
import torch
from command_line import call
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_llama, tiny_tokenizer

from nanoquant import disk
from nanoquant.doctor import checks
from nanoquant.doctor.command import Findings

pytestmark = pytest.mark.usefixtures("untouched_process")

NAMES = ["files", "parts", "tensors", "ranks", "disk", "save", "extension", "compiler", "gpu"]
GRAVE = NAMES[:6]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compiling takes seconds and has tests of its own."""
    monkeypatch.setattr(checks, "compiler_obstacle", lambda device: "")


def doctor(capsys, *arguments):
    """Exit code, state and text of every check, and the last line of stderr."""
    code, out, err = call(capsys, "doctor", *arguments)
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    states = ("not checked", "warning", "error", "ok")
    found = {n: next((s, t[len(s) :].strip()) for s in states if t.startswith(s)) for n, t in lines}
    assert list(found) == NAMES
    return code, found, err.splitlines()[-1:] or [""]


@pytest.fixture
def model(tmp_path):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def change(model, **tensors):
    """Replace stored tensors."""
    kept = load_file(model / "model.safetensors")
    save_file(kept | tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_can_be_quantized_is_found_well(family, tmp_path, capsys):
    FAMILIES[family](dtype=torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    code, found, _ = doctor(capsys, tmp_path, "--bits", 2)
    assert code == 0 and all(found[name][0] == "ok" for name in GRAVE), found
    assert "bits a weight, ranks" in found["ranks"][1] and "read back the same" in found["save"][1]


def test_what_depends_on_a_failed_check_is_not_checked(tmp_path, capsys):
    code, found, error = doctor(capsys, tmp_path / "none")
    assert code == 2 and found["files"][0] == "error"
    assert [found[name][0] for name in NAMES[1:6]] == ["not checked"] * 5
    assert error == [
        f"nanoquant: error: {tmp_path / 'none'} can't be quantized here yet: see files above"
    ]


def test_tensors_of_another_shape_or_type_are_named(model, capsys):
    name = "model.layers.0.self_attn.q_proj.weight"
    change(model, **{name: torch.zeros(8, 8, dtype=torch.bfloat16)})
    code, found, _ = doctor(capsys, model)
    assert code == 2 and f"{name} is (8, 8) and not (64, 64)" in found["tensors"][1]
    change(model, **{name: torch.zeros(64, 64).to(torch.float8_e4m3fn)})
    code, found, _ = doctor(capsys, model)
    assert code == 2 and "stored as F8_E4M3; allowed: BF16, F32, F16" in found["tensors"][1]


def test_float16_is_told_and_stops_nothing(model, capsys):
    tiny_llama(dtype=torch.float16).save_pretrained(model)
    code, found, _ = doctor(capsys, model, "--bits", 2)
    assert code == 0 and "float16 is going to be bfloat16" in found["tensors"][1]


def test_a_quantized_model_and_bits_that_can_not_be_met_are_errors(model, finished, place, capsys):
    code, found, _ = doctor(capsys, place / "out")
    assert code == 2 and "quantized already" in found["files"][1]
    code, found, _ = doctor(capsys, model, "--bits", 0.01)
    assert code == 2 and found["ranks"][0] == "error" and found["save"][0] == "not checked"


def test_too_little_room_is_said_with_how_much(model, capsys, monkeypatch):
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    code, found, _ = doctor(capsys, model, "--bits", 2, "--output", model.parent / "not" / "there")
    assert code == 2 and found["disk"][0] == "error"
    assert f"10.0 kB free in {model.parent}" in found["disk"][1]
    assert "too little" in found["disk"][1]


def test_a_config_that_is_no_causal_model_is_an_error(model, capsys):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    code, found, _ = doctor(capsys, model)
    assert code == 2 and found["parts"][0] == "error" and found["tensors"][0] == "not checked"


def test_a_check_that_is_not_grave_only_warns(capsys):
    def fail():
        raise ValueError("slow")

    findings = Findings()
    assert findings.check("gpu", fail, grave=False) is None
    assert findings.states == {"gpu": "warning"} and "slow" in capsys.readouterr().out
