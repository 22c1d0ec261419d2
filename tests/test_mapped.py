"""A dense model is read from its files when it is used, equals what transformers loads, and can be forgotten."""

import gc
import json
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, GATED, random_windows
from transformers import AutoModelForCausalLM, GenerationConfig

from nanoquant import mapped
from nanoquant.architectures import find_decoder
from nanoquant.checkpoint_files import INDEX_FILE, read_headers, shard_files
from nanoquant.mapped import forget, map_tensors, paged
from nanoquant.memory import resident_bytes
from nanoquant.sources import load_model

CPU = torch.device("cpu")


def is_mapped(tensor):
    """Whether a tensor lies in a mapped file."""
    files = ((base, file()) for base, file in mapped._maps.items())
    return any(file and base <= tensor.data_ptr() < base + len(file) for base, file in files)


def by_hand(path, tensors):
    """A safetensors file with tensors in the given order, which need not suit their alignment."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return read_headers([path], None)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_that_of_transformers_and_lies_in_its_files(family, shards, tmp_path):
    model = FAMILIES[family]()
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True, max_new_tokens=7)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1)
    assert (tmp_path / INDEX_FILE).is_file() == (shards > 1)
    ours, theirs = load_model(tmp_path, CPU), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(ours) is type(theirs) and ours.dtype == theirs.dtype and not ours.training
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    ids = random_windows(2, 8)
    assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)
    assert all(is_mapped(p) for p in ours.parameters())
    assert not any(is_mapped(p) for p in theirs.parameters())


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5Config"), reason="too old a transformers")
def test_the_language_model_of_one_that_sees_is_loaded_as_transformers_loads_it(tmp_path):
    kinds = {"layer_types": ["full_attention"] * 2}
    kinds |= {f"linear_{name}_head_dim": 16 for name in ("key", "value")}
    kinds |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 16}
    sees = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
    }
    text = GATED | {"num_hidden_layers": 2} | kinds
    config = transformers.Qwen3_5Config(text_config=text, vision_config=sees)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    ours, theirs = load_model(tmp_path, CPU), AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_windows(1, 8)
    assert type(ours) is type(theirs) and torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_converted_model_is_in_memory(tmp_path):
    FAMILIES["llama"]().half().save_pretrained(tmp_path)
    model = load_model(tmp_path, CPU, trainable=True)
    assert model.dtype == torch.bfloat16
    assert not any(is_mapped(p) for p in model.parameters())


def test_forgetting_gives_memory_back_and_loses_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.randn(4096, 2048) for name in "ab"}, path)  # 32 MB each
    tensors = map_tensors(read_headers([path], None))
    before = resident_bytes()["VmRSS"]
    sums = [float(t.sum()) for t in tensors.values()]
    used = resident_bytes()["VmRSS"]
    assert used - before > 60e6
    assert forget([tensors["a"]]) == pytest.approx(tensors["a"].nbytes, abs=2 * 4096)
    assert used - resident_bytes()["VmRSS"] == pytest.approx(32e6, rel=0.1)
    assert [float(t.sum()) for t in tensors.values()] == sums


def test_only_whole_pages_of_mapped_tensors_are_forgotten(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"small": torch.ones(8), "large": torch.ones(1 << 16)}, path)
    tensors = map_tensors(read_headers([path], None))
    assert forget([tensors["small"], torch.ones(1 << 16)]) == 0
    assert 0 < forget([tensors["large"]]) <= tensors["large"].nbytes
    assert tensors["large"].sum() == 1 << 16 and tensors["small"].sum() == 8


def test_a_file_that_nobody_uses_is_let_go(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1 << 16)}, path)
    gc.collect()
    before = len(mapped._maps)
    part = map_tensors(read_headers([path], None))["a"][5:7]
    gc.collect()
    assert len(mapped._maps) == before + 1 and part.sum() == 2
    del part
    gc.collect()
    assert len(mapped._maps) == before


def test_a_tensor_that_does_not_lie_as_its_type_needs_is_copied(tmp_path):
    values = torch.arange(5, dtype=torch.float32)
    stored = by_hand(
        tmp_path / "odd.safetensors",
        {
            "bytes": ("U8", [3], b"\x01\x02\x03"),
            "floats": ("F32", [5], values.numpy().tobytes()),
            "none": ("F32", [0, 4], b""),
        },
    )
    tensors = map_tensors(stored)
    assert torch.equal(tensors["floats"], values) and tensors["none"].shape == (0, 4)
    assert torch.equal(tensors["floats"], load_file(tmp_path / "odd.safetensors")["floats"])


def test_other_types_are_read_and_files_that_can_not_be_mapped_are_named(tmp_path):
    path = tmp_path / "eight.safetensors"
    stored = by_hand(path, {"weight": ("F8_E4M3", [2], b"\0\x38")})
    found = map_tensors(stored)["weight"]
    assert found.float().tolist() == [0.0, 1.0] and not is_mapped(found)
    path.unlink()
    with pytest.raises(ValueError, match=r"eight.safetensors can't be mapped"):
        map_tensors(stored)


def test_shards_are_mapped_once_each(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path, max_shard_size=50_000)
    files, before = shard_files(tmp_path), len(mapped._maps)
    tensors = map_tensors(read_headers(files, None))
    assert len(mapped._maps) - before == len(files) > 1 and tensors


def test_paged_blocks_forget_their_weights_when_they_have_run(tmp_path, monkeypatch):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model, ids, forgotten = load_model(tmp_path, CPU), random_windows(1, 8), []
    blocks = find_decoder(model).blocks
    expected = model(ids).logits
    monkeypatch.setattr(mapped, "forget", lambda tensors: forgotten.append(list(tensors)))
    with paged(blocks):
        assert torch.equal(model(ids).logits, expected)
    model(ids)
    assert [[id(p) for p in found] for found in forgotten] == [
        [id(p) for p in block.parameters()] for block in blocks
    ]
