"""What a run can't begin with is refused by name, through the command, before anything is written."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import SMALL, refused
from safetensors.torch import load_file, save_file
from test_lock import HOLD
from tiny_models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("untouched_process")

INDEX = "model.safetensors.index.json"


def missing(shard):
    shard.unlink()


def truncated(shard):
    shard.write_bytes(shard.read_bytes()[:-100])


def headless(shard):
    shard.write_bytes(shard.read_bytes()[:50])


def outside(shard):
    index = shard.parent / INDEX
    content = json.loads(index.read_text())
    name = next(n for n, file in content["weight_map"].items() if file == shard.name)
    content["weight_map"][name] = f"../elsewhere/{shard.name}"
    index.write_text(json.dumps(content))


def not_finite(shard):
    tensors = load_file(shard)
    min(tensors.items())[1].view(-1)[3] = torch.inf
    save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "lacks 1 of 2 shards: model-00002-of-00002.safetensors"),
        (truncated, "model-00002-of-00002.safetensors is damaged: expected"),
        (headless, "model-00002-of-00002.safetensors is truncated or not a safetensors file"),
        (outside, "names '../elsewhere/model-00002-of-00002.safetensors'; a shard must be a"),
        (not_finite, "non-finite weights in model.layers.1.input_layernorm.weight"),
    ],
)
def test_a_damaged_model_is_named(damage, words, place, tmp_path, capsys):
    model = tiny_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    damage(tmp_path / "dense" / "model-00002-of-00002.safetensors")
    command = ["quantize", tmp_path / "dense", tmp_path / "new", "--text", place / "text.txt"]
    assert words in refused(capsys, *command, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_second_process_on_a_folder_is_refused(place, tmp_path, capsys):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "new.run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            text = ["--text", place / "text.txt", *SMALL]
            message = refused(capsys, "quantize", place / "dense", tmp_path / "new", *text)
        finally:
            other.kill()
    assert "another process is at work in" in message and "wait for it" in message
    assert list((tmp_path / "new.run").iterdir()) == [] and not (tmp_path / "new").exists()
