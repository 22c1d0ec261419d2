"""The commands as a user meets them; a tiny model stands in for a real one."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from packed_models import pack_randomly
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant import console, job, parsers
from nanoquant.checkpoint import save_pretrained
from nanoquant.cli import main
from nanoquant.commands import evaluate_command, generate_command, inspect_command
from nanoquant.config import PRESETS

WORDS = "the river runs over stone and light falls on an old town where people sing\n"
SMALL = (
    "--budget.rank_multiple 8 --admm.iterations 20 --calibration.windows 4 --calibration.length 32 "
    "--block.windows 4 --block.dense_epochs 0 --block.refine_epochs 0 "
    "--model.windows 8 --model.epochs 1 --model.held_out 2"
).split()


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch):
    """Undo what the commands change for the whole process: environment and loggers."""
    for name, value in console.QUIET_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    loggers = [logging.getLogger(name) for name in ("nanoquant", *console.QUIET_LOGGERS)]
    before = [(log.level, log.handlers, log.propagate) for log in loggers]
    yield
    for log, (log.level, log.handlers, log.propagate) in zip(loggers, before, strict=True):
        log.setLevel(log.level)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(WORDS * 100)
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """A whole run of the quantize command in a process of its own."""
    command = [sys.executable, "-m", "nanoquant", "quantize", "dense", "out", *SMALL]
    command += ["--text", "text.txt", "--eval-text", "text.txt", "--eval-windows", "4"]
    command += ["--eval-length", "32", "--sample", "the river", "--sample-tokens", "5"]
    command += ["--json", "figures.json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def figures(place, finished):
    return json.loads((place / "figures.json").read_text())


def call(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments):
    """The one line with which a command refuses its input."""
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("nanoquant: phase")]
    assert len(lines) == 1 and lines[0].startswith("nanoquant: error: "), err
    return lines[0]


def settings(*flags):
    """Configuration of the quantize command for these flags."""
    return parsers.parse_quantize(["MODEL", "OUT", "--text", "TEXT", *flags])[1]


def test_quantize_prints_one_table_and_both_samples(finished):
    lines = finished.stdout.splitlines()
    assert lines[0].split() == ["out", "dense", "quantized"]
    for row in ("perplexity", "bits per weight, body", "bytes on disk", "seconds, blocks"):
        assert sum(line.startswith(row) for line in lines) == 1
    assert [line.split(":")[0] for line in lines[-3:]] == ["prompt", "dense", "quantized"]


def test_quantize_says_nothing_that_is_not_ours(finished):
    assert all(line.startswith("nanoquant: phase ") for line in finished.stderr.splitlines())


def test_json_holds_every_printed_figure(finished, figures):
    dense, quantized = figures["dense"], figures["quantized"]
    printed = [
        f"{dense['perplexity']:.2f}",
        f"{quantized['perplexity']:.2f}",
        f"{figures['excess_nats_per_token']:.3f}",
        f"{quantized['sizes']['body_bits_per_weight']:.4f}",
        f"{quantized['sizes']['model_bits_per_parameter']:.4f}",
        f"{dense['file_bytes']:,}",
        f"{quantized['file_bytes']:,}",
        f"{quantized['sizes']['bytes_resident']:,}",
        *(f"{seconds:.1f}" for seconds in figures["seconds"].values()),
    ]
    assert [number for number in printed if number not in finished.stdout] == []
    excess = math.log(quantized["perplexity"] / dense["perplexity"])
    assert figures["excess_nats_per_token"] == pytest.approx(excess)


def test_sizes_are_those_of_the_files(place, figures):
    for name, key in (("dense", "dense"), ("out", "quantized")):
        file = place / name / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert figures[key]["file_bytes"] == file.stat().st_size
        assert figures[key]["sizes"]["bytes_on_disk"] == file.stat().st_size - header
    assert 0.985 <= figures["quantized"]["sizes"]["body_bits_per_weight"] <= 1.0


def test_checkpoint_gives_the_same_figures_again(place, figures, capsys):
    flags = [
        "--text",
        place / "text.txt",
        "--windows",
        4,
        "--length",
        32,
        "--json",
        place / "again.json",
    ]
    code, out, _ = call(
        capsys, "evaluate", place / "out", *flags, "--sample", "the river", "--sample-tokens", 5
    )
    again = json.loads((place / "again.json").read_text())
    assert code == 0
    assert again["perplexity"] == figures["quantized"]["perplexity"]
    assert again["sample"] == figures["quantized"]["sample"]
    assert f"perplexity {again['perplexity']:.4f}" in out


def test_evaluate_works_on_the_dense_model_too(place, figures, capsys):
    flags = [
        "--text",
        place / "text.txt",
        "--windows",
        4,
        "--length",
        32,
        "--json",
        place / "dense.json",
    ]
    assert call(capsys, "evaluate", place / "dense", *flags)[0] == 0
    assert (
        json.loads((place / "dense.json").read_text())["perplexity"]
        == figures["dense"]["perplexity"]
    )


def test_generate_continues_a_prompt(place, figures, capsys):
    code, out, _ = call(
        capsys, "generate", place / "out", "--prompt", "the river", "--max-new-tokens", 5
    )
    assert (code, out) == (0, figures["quantized"]["sample"] + "\n")


def test_inspect_shows_ranks_and_recipe_without_reading_weights(
    place, figures, capsys, monkeypatch
):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    code, out, _ = call(capsys, "inspect", place / "out", "--json", place / "inspect.json")
    found = json.loads((place / "inspect.json").read_text())
    assert code == 0 and "self_attn.q_proj" in out and "config.admm: iterations=20" in out
    assert found["sizes"] == figures["quantized"]["sizes"]
    assert found["recipe"]["config"] == figures["report"]["config"]
    assert sum(kind["count"] for kind in found["layers"].values()) == len(
        figures["report"]["ranks"]
    )


def test_inspect_names_a_packed_head_and_counts_the_bits_of_its_tensors(tmp_path, capsys):
    model = pack_randomly(tiny_llama(), head=True, scale_dtype=torch.float32)
    save_pretrained(model, tmp_path / "out")
    assert call(capsys, "inspect", tmp_path / "out", "--json", tmp_path / "inspect.json")[0] == 0
    head = json.loads((tmp_path / "inspect.json").read_text())["layers"]["lm_head"]
    assert head["count"] == 1
    assert head["bits"] == round(model.lm_head.bits / (128 * 64), 4)


def test_help_and_mistakes_come_before_heavy_imports():
    code = (
        "import sys; from nanoquant.cli import main\n"
        "assert main(['--help']) == 0 and main(['quantise']) == 2 and main([]) == 2\n"
        "print('heavy' if {'torch', 'transformers', 'lightning', 'torchao'} & set(sys.modules) else 'light')"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "light"
    assert "quantize, evaluate, generate, inspect" in done.stderr
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    "parser",
    [
        parsers.quantize_parser(),
        parsers.command_parser("evaluate", evaluate_command, ""),
        parsers.command_parser("generate", generate_command, ""),
        parsers.command_parser("inspect", inspect_command, ""),
    ],
    ids=["quantize", "evaluate", "generate", "inspect"],
)
def test_help_explains_every_flag(parser):
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert unexplained == []


def test_flags_reach_every_field_of_the_configuration():
    flags = {action.dest for action in parsers.quantize_parser()._actions}
    fields = set(parsers._flat(PRESETS["fast"]().to_dict())) - {"step"}
    assert fields <= flags


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_alone_gives_the_configuration_of_the_library(preset):
    assert settings("--preset", preset) == PRESETS[preset]()


def test_flags_override_yaml_and_yaml_overrides_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper\nadmm:\n  iterations: 7\nblock:\n  windows: 3\n")
    config = settings("--config", str(file), "--block.windows", "5", "--bits", "0.8")
    paper = PRESETS["paper"]()
    assert (config.preset, config.block.dense_epochs) == ("paper", paper.block.dense_epochs)
    assert (config.admm.iterations, config.block.windows, config.budget.bits) == (7, 5, 0.8)


def test_bits_is_short_for_the_budget():
    assert settings("--bits", "0.55") == settings("--budget.bits", "0.55")


@pytest.mark.parametrize("yaml", ["bits: 0.7", "budget: {bits: 0.7}"])
def test_what_comes_later_wins_for_bits_by_either_name(yaml, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml)
    file = ["--config", str(tmp_path / "run.yaml")]
    assert settings(*file).budget.bits == 0.7
    for flag in (["--bits", "0.8"], ["--bits=0.8"], ["--budget.bits", "0.8"]):
        assert settings(*file, *flag).budget.bits == 0.8
        assert settings(*flag, *file).budget.bits == 0.7
    assert settings("--bits", "1.2", "--budget.bits", "1.1").budget.bits == 1.1
    assert settings("--budget.bits", "1.1", "--bits", "1.2").budget.bits == 1.2


def test_one_yaml_with_two_different_bits_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("bits: 0.7\nbudget: {bits: 1.0}\n")
    with pytest.raises(ValueError, match="bits 0.7 and budget.bits 1.0 disagree"):
        settings("--config", str(tmp_path / "run.yaml"))


def test_dashes_and_underscores_are_the_same_and_switches_need_no_value():
    arguments = ["MODEL", "OUT", "--text", "TEXT", "--verbose", "--log-dir=my-logs"]
    job, config = parsers.parse_quantize([*arguments, "--block.dense-epochs", "9"])
    assert (job.verbose, job.log_dir, config.block.dense_epochs) == (True, "my-logs", 9)


BAD_FLAGS = {
    "unknown flag": (["--bit", "1"], "flags near --bit: --bits"),
    "unknown preset": (["--preset", "turbo"], "one of fast, balanced, paper, got 'turbo'"),
    "no bits": (["--bits", "0"], "bits must be above 0, got 0.0"),
    "negative bits": (["--bits", "-1"], "bits must be above 0, got -1.0"),
    "bits not a number": (["--bits", "one"], '"budget.bits"'),
    "bits too small": (["--bits", "0.1"], "bits=0.1"),
    "bits too large": (["--bits", "9"], "bits=9.0"),
    "blocks not a slice": (["--blocks", "first"], "must look like 0:10"),
    "blocks of another model": (["--blocks", "7:9"], "none of the 2 decoder blocks"),
    "unknown schedule": (["--block.schedule", "mine"], "one of published, grouped, algorithm1"),
    "unknown logger": (["--logger", "paper"], "one of none, csv, wandb"),
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
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_quantize_refuses_bad_flags_before_any_work(flags, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("nanoquant.job.quantize", None)
    monkeypatch.setattr("nanoquant.job.perplexity", None)
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


def test_a_dense_model_can_not_be_inspected(place, capsys):
    assert "not a nanoquant checkpoint" in refused(capsys, "inspect", place / "dense")


def test_a_folder_that_is_not_empty_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    flags = ["--text", place / "text.txt", *SMALL]
    assert "is not empty" in refused(capsys, "quantize", place / "dense", tmp_path, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_argument_is_named(place, capsys):
    assert "required: text" in refused(capsys, "quantize", place / "dense", place / "new")
    assert "required: prompt" in refused(capsys, "generate", place / "dense")
    assert "--text, --sample or both" in refused(capsys, "evaluate", place / "dense")


@pytest.mark.parametrize("step", ["quantize", "save_pretrained", "find_model"])
def test_an_interrupted_run_leaves_no_checkpoint(step, place, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments, **flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"nanoquant.job.{step}", interrupt)
    if step == "save_pretrained":
        monkeypatch.setattr("nanoquant.job.quantize", lambda *arguments, **flags: FakeReport)
    code, out, err = call(
        capsys, "quantize", place / "dense", tmp_path / "new", "--text", place / "text.txt", *SMALL
    )
    assert (code, out, err.splitlines()[-1]) == (130, "", "nanoquant: interrupted")
    assert not (tmp_path / "new").exists()


def test_a_failed_measurement_loses_no_figures_and_had_the_memory(
    place, tmp_path, capsys, monkeypatch
):
    models, alive = [], []
    load, measure = job.load_model, job.measure_in_fresh_process

    def loading(*arguments):
        model = load(*arguments)
        models.append(weakref.ref(model))
        return model

    def measuring(*arguments):
        alive.extend(model() for model in models)
        measure(*arguments)

    monkeypatch.setattr(job, "load_model", loading)
    monkeypatch.setattr(job, "measure_in_fresh_process", measuring)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    flags = ["--text", place / "text.txt", "--sample", "the river", "--sample-tokens", 5, *SMALL]
    flags += ["--json", tmp_path / "figures.json"]
    code, out, err = call(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert code == 2 and "measuring it in a fresh process failed with exit code 1" in err
    assert "bits per weight, body" in out and out.splitlines()[-1] == "quantized: -"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["quantized"]["perplexity"] is None and figures["dense"]["sample"]
    assert figures["quantized"]["file_bytes"] > 0 and figures["report"]["ranks"]
    assert alive == [None]


class FakeReport:
    bits, config, seconds = 1.0, {}, {}


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


def test_csv_logger_writes_losses_under_the_name_of_the_output(place, tmp_path):
    from nanoquant.job import JobConfig, make_loggers

    job = JobConfig(source="m", output="runs/out", text="t", logger="csv", log_dir=str(tmp_path))
    (logger,) = make_loggers(job)
    logger.log_metrics({"model/loss": 1.0}, step=3)
    logger.save()
    assert "1.0" in (tmp_path / "out" / "version_0" / "metrics.csv").read_text()


@pytest.mark.slow
def test_a_killed_run_ends_at_once_and_leaves_no_checkpoint(place, tmp_path):
    command = [sys.executable, "-m", "nanoquant", "quantize", place / "dense", tmp_path / "new"]
    command += ["--text", place / "text.txt", *SMALL, "--admm.iterations", "1000000"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in run.stderr:
        if "calibrate" in line:
            break
    run.terminate()
    assert run.wait(timeout=60) == 130
    assert run.stderr.read().splitlines()[-1] == "nanoquant: interrupted"
    assert not (tmp_path / "new").exists()
