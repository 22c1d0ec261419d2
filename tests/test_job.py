"""The quantize command from a dense folder to one table; a tiny model stands in for a real one."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from command_line import SMALL, call, refused
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant import finish, job
from nanoquant.checkpoint import load
from nanoquant.evaluation.perplexity import perplexity
from nanoquant.recorder import PHASES
from nanoquant.sensitivity import SensitivityProbe

pytestmark = pytest.mark.usefixtures("untouched_process")


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
    if step != "find_model":  # before which there is no run
        run = json.loads((tmp_path / "new.run" / "run.json").read_text())
        assert (run["status"], run["error"]) == ("failed", "interrupted")


def test_figures_of_the_dense_model_are_measured_once_for_a_killed_run_and_what_goes_on(
    place, tmp_path, capsys, monkeypatch
):
    calls = []

    def counting(*arguments, **flags):
        calls.append(arguments)
        return perplexity(*arguments, **flags)

    def interrupt(*arguments, **flags):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanoquant.measuring.perplexity", counting)
    command = ["quantize", place / "dense", tmp_path / "new", "--text", place / "text.txt", *SMALL]
    command += ["--eval-text", place / "text.txt", "--eval-length", 16, "--sample", "the river"]
    for windows, measured in ((2, 1), (2, 1), (3, 2)):  # other windows are measured anew
        with monkeypatch.context() as patch:
            patch.setattr("nanoquant.job.save_pretrained", interrupt)
            assert call(capsys, *command, "--eval-windows", windows)[0] == 130
        assert len(calls) == measured
    figures = tmp_path / "figures.json"
    assert call(capsys, *command, "--eval-windows", 3, "--json", figures)[0] == 0
    dense = json.loads(figures.read_text())["dense"]
    assert len(calls) == 2 and dense["perplexity"] > 1 and dense["sample"]
    assert not list((tmp_path / "new.run").glob("unfinished-*"))


def test_a_failed_measurement_loses_no_figures_and_had_the_memory(
    place, tmp_path, capsys, monkeypatch
):
    models, alive = [], []
    load_model, measure = job.load_model, finish.measure_in_fresh_process

    def loading(*arguments, **flags):
        model = load_model(*arguments, **flags)
        models.append(weakref.ref(model))
        return model

    def measuring(*arguments):
        alive.extend(model() for model in models)
        measure(*arguments)

    monkeypatch.setattr(job, "load_model", loading)
    monkeypatch.setattr(finish, "measure_in_fresh_process", measuring)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    flags = ["--text", place / "text.txt", "--sample", "the river", "--sample-tokens", 5, *SMALL]
    flags += ["--json", tmp_path / "figures.json"]
    code, out, err = call(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert code == 2 and "measuring it in a fresh process failed with exit code 1" in err
    assert "nanoquant resume" in err
    assert "bits per weight, body" in out and out.splitlines()[-1] == "quantized: -"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["quantized"]["perplexity"] is None and figures["dense"]["sample"]
    assert figures["quantized"]["file_bytes"] > 0 and figures["report"]["ranks"]
    assert alive == [None]


class FakeReport:
    bits, config, seconds = 1.0, {}, {}
    to_dict = dict


def test_a_float16_model_is_loaded_and_saved_in_bfloat16_and_says_so(place, tmp_path, capsys):
    tiny_llama(dtype=torch.float16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    flags = ["--text", place / "text.txt", *SMALL, "--model.train", "none"]
    code, _, err = call(capsys, "quantize", tmp_path / "dense", tmp_path / "new", *flags)
    assert code == 0 and "is stored in float16; it is loaded and saved in bfloat16" in err
    assert load(tmp_path / "new").dtype == torch.bfloat16


def test_verbose_tells_what_every_block_gave(place, tmp_path, capsys):
    flags = ["--text", place / "text.txt", *SMALL, "--verbose"]
    _, _, err = call(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    for line in ("block 0: largest weight error", "block 1: largest", "held-out divergence"):
        assert line in err


def test_the_run_is_on_record_beside_the_checkpoint(place, finished, figures):
    run = json.loads((place / "out.run" / "run.json").read_text())
    assert (run["status"], run["source"], run["output"]) == ("finished", "dense", "out")
    assert run["figures"] == figures and run["seconds"] == figures["seconds"]
    assert run["memory_bytes"].keys() == run["seconds"].keys()
    lines = (place / "out.run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {r["phase"] for r in records} == set(PHASES)
    measured = {r["model"]: r["perplexity"] for r in records if "perplexity" in r}
    assert measured == {name: figures[name]["perplexity"] for name in ("dense", "quantized")}
    assert "model/loss" in (place / "out.run" / "csv" / "metrics.csv").read_text()


def test_a_run_whose_record_can_not_be_written_is_refused(place, tmp_path, capsys):
    (tmp_path / "new.run").write_text("in the way")
    flags = ["--text", place / "text.txt", *SMALL]
    message = refused(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert "the record of the run can't be made" in message and "new.run' is a file" in message
    assert not (tmp_path / "new").exists()


def test_a_run_interrupted_while_it_measures_ranks_goes_on_from_its_record(
    place, tmp_path, capsys, monkeypatch
):
    measure, measured = SensitivityProbe.measure, []

    def interrupted(probe, block, names, importances):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(names)
        return measure(probe, block, names, importances)

    flags = ["--text", place / "text.txt", *SMALL, "--budget.allocation", "measured"]
    flags += ["--sensitivity.iterations", "3", "--model.train", "none"]
    command = ["quantize", place / "dense", tmp_path / "new", *flags]
    with monkeypatch.context() as patch:
        patch.setattr(SensitivityProbe, "measure", interrupted)
        assert call(capsys, *command)[0] == 130
    code, _, err = call(capsys, *command)
    assert code == 0 and "phase 3 of 7: ranks, 5/5" in err
    (kept,) = tmp_path.glob("new.run*/sensitivity-*.json")
    assert kept.parent.name == "new.run" and len(json.loads(kept.read_text())["groups"]) == 8
    lines = (tmp_path / "new.run" / "metrics.jsonl").read_text().splitlines()
    ranks = [r for r in map(json.loads, lines) if r["phase"] == "ranks"]
    assert sum("exponent" in r for r in ranks) == 14 and any("seconds" in r for r in ranks)


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
