"""The bytes of a checkpoint are known beforehand: files of the command against its estimate."""

import json

import pytest
import torch
from command_line import SMALL, WORDS, call
from tiny_models import FAMILIES, tiny_gemma3, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer

from nanoquant.budget import allocate_ranks
from nanoquant.checkpoint import pack_model, read_sizes, save_pretrained
from nanoquant.config import nanoquant_config
from nanoquant.estimate import machine
from nanoquant.estimate.files import weight_files
from nanoquant.estimate.subject import subject_of_folder
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_embeddings import quantize_embeddings
from nanoquant.sources import load_model

pytestmark = pytest.mark.usefixtures("untouched_process")

MODELS = {
    "tied head": lambda: tiny_llama(tie=True, dtype=torch.bfloat16),
    "untied head": lambda: tiny_llama(tie=False, dtype=torch.bfloat16),
    "bias": lambda: tiny_qwen2(dtype=torch.bfloat16),
    "norms of another kind": lambda: tiny_gemma3(dtype=torch.bfloat16),
    "float32, Conv1D": lambda: tiny_gpt2(dtype=torch.float32),
    "float16": lambda: tiny_llama(dtype=torch.float16),
}
OWN = SMALL[: SMALL.index("--verify")]  # the rest is about the checkpoint
FLAGS = [*OWN, "--budget.allocation", "uniform", "--importance.curvature", "diagonal"]
FLAGS += ["--model.train", "none", "--admm.iterations", 2, "--bits", 2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Rates are of no interest here."""
    monkeypatch.setattr(machine, "SECONDS", 1e-4)


def folder_of(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder):
    return {f.name: f.stat().st_size for f in folder.iterdir() if "safetensors" in f.name}


def estimated(capsys, tmp_path, dense, *flags):
    file = tmp_path / "estimate.json"
    code, out, err = call(capsys, "estimate", dense, *flags, "--json", file)
    assert code == 0, err
    return json.loads(file.read_text()), out


QUICK = [("tied head", 16), ("untied head", 8)]
EVERY = [*((kind, 16) for kind in MODELS), ("tied head", 8), ("untied head", 8)]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in EVERY],
)
def test_every_file_has_the_size_that_was_estimated(kind, bits, tmp_path, capsys):
    dense = folder_of(MODELS[kind](), tmp_path / "dense")
    (tmp_path / "text.txt").write_text(WORDS * 100)
    flags = [*FLAGS, "--embedding.bits", bits]
    found, out = estimated(capsys, tmp_path, dense, *flags)
    command = ["quantize", dense, tmp_path / "out", "--text", tmp_path / "text.txt", *flags]
    assert call(capsys, *command)[0] == 0
    (size,) = found["sizes"]
    assert size["exact"] and size["files"] == weights(tmp_path / "out")
    assert f"{sum(size['files'].values()):,}" in out
    sizes = read_sizes(tmp_path / "out").to_dict()
    assert {name: size[name] for name in sizes} == sizes


def test_measured_ranks_end_within_the_estimated_range(place, finished, tmp_path, capsys):
    found, _ = estimated(capsys, tmp_path, place / "dense", *OWN)
    (size,) = found["sizes"]
    (written,) = weights(place / "out").values()
    assert not size["exact"] and size["least_bytes"] <= written <= size["most_bytes"]
    assert size["most_bytes"] < 1.1 * size["least_bytes"]


def test_a_budget_for_the_file_has_a_size_for_each_storage_of_the_embedding(tmp_path, capsys):
    dense = folder_of(tiny_llama(dtype=torch.bfloat16), tmp_path / "dense")
    flags = [*OWN, "--budget.file", "44kB", "--embedding.bits", "null"]
    found, _ = estimated(capsys, tmp_path, dense, *flags)
    assert [size["embedding_bits"] for size in found["sizes"]] == [16, 8, 4]
    assert all(size["most_bytes"] <= 44_000 for size in found["sizes"])


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_their_index_have_the_sizes_that_were_estimated(family, bits, tmp_path):
    dense = folder_of(FAMILIES[family](dtype=torch.bfloat16), tmp_path / "dense")
    config = nanoquant_config(2.0, budget={"allocation": "uniform", "rank_multiple": 8})
    config = nanoquant_config(2.0, budget=config.budget, embedding={"bits": bits})
    subject = subject_of_folder(dense, config)
    ranks = allocate_ranks(subject.shapes, config.budget)
    found = weight_files(subject.model, ranks, config.embedding, shard=20_000)
    model = load_model(dense, torch.device("cpu"), trainable=True)
    for name, rank in ranks.items():
        d_out, d_in = subject.shapes[name]
        bias = model.get_submodule(name).bias is not None
        model.set_submodule(name, BinaryLowRankLinear(d_in, d_out, rank, bias))
    quantize_embeddings(pack_model(model), config.embedding)
    save_pretrained(model, tmp_path / "out", max_shard_size=20_000)
    assert len(found.files) > 2 and found.files == weights(tmp_path / "out")
    assert found.sizes == read_sizes(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.sizes.bytes_on_disk
