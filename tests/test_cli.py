"""What the commands refuse, in one line, and what ends them."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, call, refused

from nanoquant.cli import main

pytestmark = pytest.mark.usefixtures("untouched_process")


def test_help_and_mistakes_come_before_heavy_imports():
    code = (
        "import sys; from nanoquant.cli import main\n"
        "assert main(['--help']) == 0 and main(['quantise']) == 2 and main([]) == 2\n"
        "print('heavy' if {'torch', 'transformers', 'lightning', 'torchao'} & set(sys.modules) else 'light')"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "light"
    assert "quantize, resume, evaluate, generate, inspect, bench" in done.stderr
    assert time.monotonic() - begun < 3


BAD_FLAGS = {
    "unknown flag": (["--bit", "1"], "flags near --bit: --bits"),
    "unknown preset": (
        ["--preset", "turbo"],
        "one of fast, balanced, best, long, paper, got 'turbo'",
    ),
    "no bits": (["--bits", "0"], "bits must be above 0, got 0.0"),
    "negative bits": (["--bits", "-1"], "bits must be above 0, got -1.0"),
    "bits not a number": (["--bits", "one"], '"budget.bits"'),
    "bits too small": (["--bits", "0.1"], "bits=0.1"),
    "bits too large": (["--bits", "9"], "bits=9.0"),
    "blocks not a slice": (["--blocks", "first"], "must look like 0:10"),
    "blocks of another model": (["--blocks", "7:9"], "none of the 2 decoder blocks"),
    "unknown schedule": (["--block.schedule", "mine"], "one of published, grouped, algorithm1"),
    "bits of the embedding": (["--embedding.bits", "3"], "must be 16, 8 or 4, got 3"),
    "group of the embedding": (
        ["--embedding.bits", "4", "--embedding.group-size", "96"],
        "group_size=96 does not divide the 64 columns",
    ),
    "unknown logger": (["--logger", "paper"], "one of csv, tensorboard, wandb"),
    "text too short": (["--calibration.windows", "1000"], "needed are 32064"),
    "held-out text too short": (
        ["--eval-text", "text.txt", "--eval-windows", "900"],
        "windows of 512",
    ),
    "held-out text missing": (["--eval-text", "text.text"], "near names there: text.txt"),
    "no folder for figures": (["--json", "nowhere/figures.json"], "there is no folder nowhere"),
    "figures where the checkpoint goes": (["--json", "new"], "--json new is the output folder"),
    "no prompt": (["--sample", " "], "the prompt is empty"),
    "no such configuration": (["--config", "none.yaml"], "File does not exist"),
    "no GPU": (["--run.accelerator", "gpu"], "finds no GPU"),
    "unknown accelerator": (["--run.accelerator", "gpuu"], "auto, cpu, gpu or cuda, got 'gpuu'"),
    "held-out windows too long": (
        ["--eval-text", "text.txt", "--eval-windows", "1", "--eval-length", "4096"],
        "longer than the model's",
    ),
    "precision of another model": (["--run.precision", "32-true"], "needs a float32 model"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_quantize_refuses_bad_flags_before_any_work(flags, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("nanoquant.job.quantize", None)
    monkeypatch.setattr("nanoquant.measuring.perplexity", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in refused(
        capsys, "quantize", "dense", "new", "--text", "text.txt", *SMALL, *flags
    )
    assert not (place / "new").exists()


TEXTS = {
    "empty": (b"", "is empty"),
    "binary": (b"text\0text", "is a binary file"),
    "not UTF-8": (b"\xff\xfe\xfa", "is not UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
def test_quantize_refuses_a_file_that_is_not_text(content, message, place, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(content)
    flags = ["--text", tmp_path / "bad.txt", *SMALL]
    assert message in refused(capsys, "quantize", place / "dense", tmp_path / "new", *flags)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even root")
def test_figures_where_nothing_can_be_written_are_refused(place, tmp_path, capsys):
    flags = ["--text", place / "text.txt", "--json", "/proc/figures.json"]
    line = refused(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert "--json /proc/figures.json can't be written" in line


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr("nanoquant.commands.load_model", None)
    for command in (["evaluate", "--sample", ""], ["generate", "--prompt", ""]):
        assert "the prompt is empty" in refused(capsys, command[0], place / "dense", *command[1:])


def copy_without(place, target, *names):
    target.mkdir()
    for file in (place / "dense").iterdir():
        if file.name not in names:
            (target / file.name).symlink_to(file)


@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate"])
def test_an_incomplete_model_folder_is_named_with_what_it_lacks(command, place, tmp_path, capsys):
    flags = {
        "quantize": [tmp_path / "new", "--text", place / "text.txt", *SMALL],
        "evaluate": ["--text", place / "text.txt"],
        "generate": ["--prompt", "the"],
    }[command]
    for number, name in enumerate(("config.json", "tokenizer.json", "model.safetensors")):
        copy_without(place, tmp_path / str(number), name)
        line = refused(capsys, command, tmp_path / str(number), *flags)
        assert str(tmp_path / str(number)) in line and name in line


@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_truncated_weights_of_a_dense_model_are_named(command, place, tmp_path, capsys):
    copy_without(place, tmp_path / "model", "model.safetensors")
    whole = (place / "dense" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[:-100])
    flags = {"quantize": [tmp_path / "new", *SMALL], "evaluate": []}[command]
    line = refused(capsys, command, tmp_path / "model", *flags, "--text", place / "text.txt")
    assert "model.safetensors is damaged" in line


def test_weights_that_a_model_lacks_are_not_made_up(place, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    copy_without(place, tmp_path / "model", "model.safetensors")
    tensors = load_file(place / "dense" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    line = refused(
        capsys, "evaluate", tmp_path / "model", "--text", place / "text.txt", "--windows", 2
    )
    assert "model.layers.1.mlp.up_proj.weight" in line


def test_a_quantized_model_is_not_quantized_again(place, finished, tmp_path, capsys):
    flags = ["--text", place / "text.txt", *SMALL]
    assert "quantized already" in refused(
        capsys, "quantize", place / "out", tmp_path / "new", *flags
    )


@pytest.mark.parametrize("field", ["modules", "recipe"])
def test_a_checkpoint_whose_config_lost_a_field_is_named(field, place, finished, tmp_path, capsys):
    shutil.copytree(place / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"][field] = "gone"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert f"has no {field}" in refused(capsys, "inspect", tmp_path / "out")


def test_a_dense_model_can_not_be_inspected(place, capsys):
    assert "not a nanoquant checkpoint" in refused(capsys, "inspect", place / "dense")


def test_a_folder_that_is_not_empty_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    flags = ["--text", place / "text.txt", *SMALL]
    assert "is not empty" in refused(capsys, "quantize", place / "dense", tmp_path, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_argument_is_named(place, capsys):
    assert "required: --text" in refused(capsys, "quantize", place / "dense", place / "new")
    assert "--prompt TEXT, --prompts FILE" in refused(capsys, "generate", place / "dense")
    assert "--text, --protocol, --zero-shot, --sample" in refused(
        capsys, "evaluate", place / "dense"
    )


def test_a_fault_of_ours_shows_its_traceback(place, capsys, monkeypatch):
    monkeypatch.setattr("nanoquant.commands.find_model", lambda name: {}["missing"])
    with pytest.raises(KeyError):
        main(["generate", "dense", "--prompt", "the"])


@pytest.mark.parametrize(
    ("code", "expected"), [(None, (0, "")), (3, (3, "")), ("no GPU", (1, "no GPU"))], ids=str
)
def test_a_library_that_leaves_the_process_gives_its_code(code, expected, capsys, monkeypatch):
    def leave(name):
        raise SystemExit(code)

    monkeypatch.setattr("nanoquant.commands.find_model", leave)
    found, _, err = call(capsys, "generate", "dense", "--prompt", "the")
    assert (found, err.strip().removeprefix("nanoquant: error: ")) == expected


def test_debug_shows_the_traceback_of_bad_input(monkeypatch):
    monkeypatch.setenv("NANOQUANT_DEBUG", "1")
    with pytest.raises(ValueError, match="no command"):
        main(["quantise"])
