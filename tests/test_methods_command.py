"""The commands on a model whose weights are looked up: quantize, inspect, generate, evaluate, doctor, report."""

import json

import pytest
import torch
from command_line import WORDS, call, refused
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.checkpoint import load, read_sizes
from nanoquant.config import nanoquant_config
from nanoquant.estimate import machine
from nanoquant.estimate.operations import kmeans
from nanoquant.estimate.size import size_of
from nanoquant.estimate.subject import subject_of_folder
from nanoquant.methods import entry_of
from nanoquant.packed_layers import packed_modules
from nanoquant.product import KMeansConfig
from nanoquant.product_budget import ProductShape
from nanoquant.product_packed import PackedProductLinear

FLAGS = (
    "--method product --bits 2.0 --calibration.windows 4 --calibration.length 32 --model.windows 8 "
    "--model.held_out 2 --product.kmeans.rounds 2"
).split()

pytestmark = pytest.mark.usefixtures("untouched_process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked up")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(WORDS * 100)
    return folder


def test_a_model_is_quantized_and_used_by_every_command(folder, capsys):
    text, out = folder / "text.txt", folder / "out"
    seen = [
        "--eval-text",
        text,
        "--eval-windows",
        4,
        "--eval-length",
        32,
        "--json",
        folder / "j.json",
    ]
    code, _, err = call(capsys, "quantize", folder / "dense", out, "--text", text, *FLAGS, *seen)
    assert code == 0, err  # a fresh process has verified and measured it
    figures = json.loads((folder / "j.json").read_text())
    assert figures["quantized"]["perplexity"] < 1.5 * figures["dense"]["perplexity"]
    layers = packed_modules(load(out))
    assert len(layers) == 14 and {type(m) for m in layers.values()} == {PackedProductLinear}

    config = nanoquant_config(2.0, method="product")
    size = size_of(subject_of_folder(folder / "dense", config), config)
    assert {f.name: f.stat().st_size for f in out.glob("*.safetensors")} == size.files.files
    assert size.files.sizes == read_sizes(out) and size.exact
    assert {name: layer.shape for name, layer in layers.items()} == size.given

    code, shown, err = call(capsys, "inspect", out)
    assert code == 0 and "codebooks" in shown and "method='product'" in shown, err
    code, shown, err = call(capsys, "generate", out, "--prompt", "the river", "--max-new-tokens", 4)
    assert code == 0 and shown, err
    code, _, err = call(
        capsys, "evaluate", out, "--text", text, "--windows", 2, "--length", 32, "--dense", "none"
    )
    assert code == 0, err
    code, _, err = call(capsys, "report", out)
    assert code == 0, err
    page = next(folder.glob("out*/**/*.html")).read_text()
    assert "Codebooks of each layer" in page and str(next(iter(size.given.values()))) in page


def test_doctor_finds_codebooks_for_the_bits(folder, capsys):
    _, shown, _ = call(capsys, "doctor", folder / "dense", "--bits", 2, "--method", "product")
    line = next(line for line in shown.splitlines() if line.startswith("ranks"))
    assert "codebooks" in line and "ok" in line
    assert any(line.startswith("save") and "ok" in line for line in shown.splitlines())


def test_bits_that_no_codebooks_meet_are_refused_with_the_nearest(folder, capsys):
    command = ["quantize", folder / "dense", folder / "no", "--text", folder / "text.txt"]
    line = refused(capsys, *command, *FLAGS, "--bits", 0.01)
    assert "bits=0.01 can't be met" in line and "the nearest that can is" in line


@pytest.mark.parametrize("machine_of", ["here", "h100"])
def test_estimate_knows_files_memory_and_time(folder, machine_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 1e-4)
    file, dense = tmp_path / "estimate.json", folder / "dense"
    command = ["estimate", dense, *FLAGS, "--machine", machine_of, "--json", file]
    code, shown, err = call(capsys, *command)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert "codebooks" in shown and all(low < high for low, high in found["seconds"].values())
    assert {"calibrate", "blocks", "model", "pack"} <= found["memory"].keys()
    layers = found["sizes"][0]["layers"]
    config = nanoquant_config(2.0, method="product")
    planned = size_of(subject_of_folder(dense, config), config).given
    assert {name: entry_of(size) for name, size in planned.items()} == {
        name: entry | {"widths": tuple(entry["widths"])} for name, entry in layers.items()
    }


def test_a_promise_for_memory_that_can_not_be_kept_is_refused(folder, capsys):
    command = ["quantize", folder / "dense", folder / "no", "--text", folder / "text.txt"]
    line = refused(capsys, *command, *FLAGS, "--max-memory", "1MB")
    assert "--max-memory 1.0 MB can't be kept" in line and "the smallest that would do is" in line


def test_more_work_is_counted_for_more_entries_and_as_much_for_half_the_slabs():
    config = KMeansConfig()
    few, many = (kmeans(256, 256, ProductShape(8, (width,)), config) for width in (4, 8))
    assert 8 < many.full / few.full < 32
    slabs = kmeans(256, 256, ProductShape(8, (4,), 2), config)
    halves = kmeans(128, 256, ProductShape(8, (4,)), config)
    assert slabs.full == 2 * halves.full
