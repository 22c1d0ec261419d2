import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from packed_models import pack_randomly
from tiny_models import (
    random_windows,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_phi,
    tiny_phi3,
    tiny_qwen2,
)
from torch import nn

from nanoquant.checkpoint import load, pack_model, read_sizes, save_pretrained
from nanoquant.checkpoint_files import INDEX_FILE, read_header
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.packed_tensor import PackedBinaryTensor
from nanoquant.product_budget import ProductShape

WINDOWS = random_windows(2, 16)
MODELS = {
    "tied llama": lambda: pack_randomly(tiny_llama()),
    "untied llama": lambda: pack_randomly(tiny_llama(tie=False)),
    "bfloat16 llama": lambda: pack_randomly(tiny_llama(dtype=torch.bfloat16)),
    "float32 scales": lambda: pack_randomly(
        tiny_llama(dtype=torch.bfloat16), scale_dtype=torch.float32
    ),
    "packed head": lambda: pack_randomly(tiny_llama(), head=True),
    "gpt2": lambda: pack_randomly(tiny_gpt2()),
    "opt": lambda: pack_randomly(tiny_opt()),
    "qwen2": lambda: pack_randomly(tiny_qwen2()),
    "gemma3": lambda: pack_randomly(tiny_gemma3()),
    "phi": lambda: pack_randomly(tiny_phi()),
    "phi3": lambda: pack_randomly(tiny_phi3()),
    "looked-up llama": lambda: pack_randomly(tiny_llama(), ProductShape(8, (4, 4))),
    "looked-up gpt2": lambda: pack_randomly(tiny_gpt2(), ProductShape(4, (6,), 2)),
    "looked-up head, float32": lambda: pack_randomly(
        tiny_llama(), ProductShape(7, (4,)), head=True, scale_dtype=torch.float32
    ),
}


@torch.no_grad()
def logits(model):
    return model(WINDOWS).logits


@pytest.fixture(scope="module")
def packed():
    return pack_randomly(tiny_llama())


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    return save_pretrained(packed, tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.mark.parametrize("name", MODELS)
def test_loaded_and_saved_again_the_logits_are_the_same_bits(name, tmp_path):
    model = MODELS[name]()
    first = load(save_pretrained(model, tmp_path / "first", recipe={"bits": 1.0}))
    second = load(save_pretrained(first, tmp_path / "second"), device_map="cpu")
    second.save_pretrained(tmp_path / "third")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    expected = logits(model)
    for loaded in (first, second, third):
        assert torch.equal(logits(loaded), expected)
        assert loaded.config.quantization_config.recipe == {"bits": 1.0}
        before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
        assert {n: p.dtype for n, p in before.items()} == {n: p.dtype for n, p in after.items()}


def test_same_model_gives_the_same_config_and_tensors(packed, folder, tmp_path):
    again = save_pretrained(packed, tmp_path / "again")
    name = "model.safetensors"  # whose header lists its metadata in no fixed order
    sizes = [sum(t.bytes for t in read_header(f / name)[0].values()) for f in (folder, again)]
    data = [(f / name).read_bytes()[-size:] for f, size in zip((folder, again), sizes, strict=True)]
    assert data[0] == data[1]
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_sharded_checkpoint_loads(packed, tmp_path):
    folder = save_pretrained(packed, tmp_path / "sharded", max_shard_size="20KB")
    assert (folder / INDEX_FILE).is_file() and len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(folder)), logits(packed))


def test_tied_embeddings_stay_tied_and_are_stored_once(folder):
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored, _ = read_header(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) + ("model.embed_tokens.weight" in stored) == 1


def test_a_packed_head_that_was_tied_gets_a_warning_once(caplog, tmp_path):
    model = pack_randomly(tiny_llama(), head=True)
    save_pretrained(model, tmp_path / "out")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "lm_head.weight and model.embed_tokens.weight are no longer tied" in warning
    caplog.clear()
    pack_randomly(tiny_llama(tie=False), head=True), pack_randomly(tiny_llama())
    assert not caplog.records


def test_packed_tensors_are_frozen_after_loading(folder):
    module = load(folder).model.layers[0].mlp.up_proj
    assert isinstance(module, PackedBinaryLinear)
    assert not any(p.requires_grad for p in module.parameters())


def test_generation_works_after_loading(folder):
    tokens = load(folder).generate(WINDOWS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 20)


def test_another_dtype_leaves_scales_as_stored(folder):
    model = load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.s1.dtype == torch.bfloat16
    assert load(folder, dtype="float32").model.layers[0].mlp.up_proj.s1.dtype == torch.bfloat16


FRESH_PROCESS = """
import json, sys
import torch
import nanoquant.checkpoint
from transformers import AutoModelForCausalLM

small, large, out = sys.argv[1:]


def rise(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted anew from here
    before = resident("VmHWM")
    result = work()
    return result, resident("VmHWM") - before


def resident(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))


load = AutoModelForCausalLM.from_pretrained
windows = torch.load(f"{out}/windows.pt")
with torch.no_grad():
    torch.save(load(small)(windows).logits, f"{out}/logits.pt")
model, loaded = rise(lambda: load(large))
subclass = "nanoquant.packed_tensor" in sys.modules
_, dense = rise(model.dequantize)
figures = {"loaded": loaded, "dense": dense, "subclass": subclass}
json.dump(figures, open(f"{out}/figures.json", "w"))
"""


@pytest.fixture(scope="module")
def fresh_process(packed, folder, tmp_path_factory):
    """What a new process saw: logits, and how loading a larger model raised its peak memory."""
    out = tmp_path_factory.mktemp("fresh")
    with torch.device("meta"):
        large = tiny_llama(layers=3, hidden_size=1024, intermediate_size=4096)
    pack_large(large)
    save_pretrained(large, out / "large")
    torch.save(WINDOWS, out / "windows.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder), str(out / "large"), str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    dense_bytes = 4 * read_sizes(out / "large").body_weights
    return (
        torch.load(out / "logits.pt"),
        json.loads((out / "figures.json").read_text()),
        dense_bytes,
    )


def pack_large(model):
    """Fill a model on the meta device without ever making its linears dense."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            d_out, d_in = module.weight.shape
            model.set_submodule(name, PackedBinaryLinear(d_in, d_out, 32, False))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            values = nn.Parameter(torch.ones(parameter.shape))
            setattr(model.get_submodule(owner), leaf, values)
    model.tie_weights()


def test_a_fresh_process_gives_the_same_logits_bit_for_bit(packed, fresh_process):
    assert torch.equal(fresh_process[0], logits(packed))


def test_loading_never_makes_a_dense_weight(fresh_process):
    _, figures, dense_bytes = fresh_process
    assert figures["dense"] > 0.5 * dense_bytes, "the measurement must see dense weights"
    assert figures["loaded"] < 0.15 * dense_bytes


def test_loading_needs_no_tensor_subclass(fresh_process):
    assert not fresh_process[1]["subclass"]


def test_other_files_of_the_source_come_along_and_weights_do_not(packed, tmp_path):
    source = tmp_path / "source"
    (source / "templates").mkdir(parents=True)
    (source / ".git").mkdir()
    for name in ("tokenizer.json", "LICENSE", "templates/chat.jinja", "config.json"):
        (source / name).write_text(f"source {name}")
    for name in ("model-00001-of-00001.safetensors", INDEX_FILE, "old.bin", ".git/HEAD"):
        (source / name).write_text("not wanted")
    folder = save_pretrained(packed, tmp_path / "out", source=source)
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert files == own | {"tokenizer.json", "LICENSE", "templates/chat.jinja"}
    assert (folder / "LICENSE").read_text() == "source LICENSE"
    assert "quantization_config" in json.loads((folder / "config.json").read_text())


def test_nothing_in_the_folder_names_where_it_was_made(folder):
    assert str(folder.parent) not in (folder / "config.json").read_text()


def test_linears_with_packed_weights_become_packed_layers(packed):
    model = tiny_llama()
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedBinaryLinear):
            model.get_submodule(name).weight = nn.Parameter(layer.weight, requires_grad=False)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, PackedBinaryTensor)
    model.load_state_dict(
        {n: p for n, p in packed.state_dict().items() if "layers" not in n or "norm" in n},
        strict=False,
    )
    pack_model(model)
    assert torch.equal(logits(model), logits(packed))


def test_biases_take_the_dtype_of_the_model():
    model = pack_randomly(tiny_opt(dtype=torch.bfloat16))
    assert model.model.decoder.layers[0].fc1.bias.dtype == torch.bfloat16


def test_sizes_of_a_folder_are_those_of_the_model(packed, folder):
    assert read_sizes(folder) == read_sizes(packed) == read_sizes(load(folder))


@pytest.mark.parametrize("name", MODELS)
def test_bytes_on_disk_are_those_of_the_files_within_their_headers(name, tmp_path):
    model = MODELS[name]()
    folder = save_pretrained(model, tmp_path / "out", max_shard_size="30KB")
    sizes = read_sizes(folder)
    assert sizes == read_sizes(model)
    files = list(folder.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(f.open("rb").read(8), "little") for f in files)
    assert sum(f.stat().st_size for f in files) == sizes.bytes_on_disk + headers
