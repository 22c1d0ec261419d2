"""Checkpoints with an embedding and a head at 8 or 4 bits."""

import json

import pytest
import torch
import transformers
from packed_models import pack_randomly
from test_embedding import BOTH, logits, small
from test_public_api import python
from tiny_models import (
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_phi,
)

from nanoquant.checkpoint import load, read_sizes, save_pretrained
from nanoquant.checkpoint_files import read_header
from nanoquant.embedding import (
    QuantizedHead,
)
from nanoquant.model_embeddings import quantize_embeddings
from nanoquant.sizes import measure_sizes

MODELS = {
    "tied llama": tiny_llama,
    "untied llama": lambda: tiny_llama(tie=False),
    "bfloat16 llama": lambda: tiny_llama(dtype=torch.bfloat16),
    "gemma3": tiny_gemma3,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "phi, whose head has a bias": tiny_phi,
}


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_loaded_and_saved_again_the_logits_are_the_same_bits(name, config, tmp_path):
    model = small(MODELS[name], config)
    expected, sizes = logits(model), measure_sizes(model)
    first = load(save_pretrained(model, tmp_path / "first"))
    first.save_pretrained(tmp_path / "second")
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for loaded in (first, second):
        assert torch.equal(logits(loaded), expected)
        before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
        assert {n: p.dtype for n, p in before.items()} == {n: p.dtype for n, p in after.items()}
        assert not any(p.requires_grad for n, p in after.items() if n.endswith("scales"))
        assert measure_sizes(loaded) == sizes
    assert (tmp_path / "first/config.json").read_bytes() == (
        tmp_path / "second/config.json"
    ).read_bytes()


@BOTH
def test_a_tied_head_has_no_tensors_of_its_own_in_memory_or_on_disk(config, tmp_path):
    model = small(config=config)
    folder = save_pretrained(model, tmp_path / "out")
    stored, _ = read_header(folder / "model.safetensors")
    assert not [name for name in stored if name.startswith("lm_head")]
    for tied in (model, load(folder)):
        tied.tie_weights()
        head, embedding = tied.get_output_embeddings(), tied.get_input_embeddings()
        assert isinstance(head, QuantizedHead) and head.codes is embedding.codes
        assert head.scales is embedding.scales and head.zeros is embedding.zeros


@BOTH
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_sizes_are_the_bytes_of_the_file_within_its_header(config, tie, tmp_path):
    dense = tiny_llama(tie=tie, dtype=torch.bfloat16)
    parameters = measure_sizes(dense).parameters
    folder = save_pretrained(quantize_embeddings(pack_randomly(dense), config), tmp_path / "out")
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.open("rb").read(8), "little")
    for sizes in (read_sizes(folder), measure_sizes(load(folder))):
        assert sizes.bytes_on_disk == file.stat().st_size - header
        assert sizes.parameters == parameters
        assert sizes.embedding_weights == 128 * 64 * (1 if tie else 2)
        expected = 8 + 16 / 64 if config.bits == 8 else 4 + 16 / 32 + 8 / 32
        assert sizes.embedding_bits_per_weight == expected


LOAD = """
import sys
import torch
import nanoquant
from transformers import AutoModelForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode
dense = []
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_meta:
                dense.extend([func] * (t.untyped_storage().nbytes() >= 2 * 128 * 64))
        return out
with Watch():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
windows = torch.randint(3, 128, (2, 16), generator=torch.manual_seed(0))
largest = max(p.numel() for p in model.parameters() if p.is_floating_point())
with torch.no_grad():
    print(torch.equal(model(windows).logits, torch.load(sys.argv[2])), largest < 128 * 64, dense)
"""


@BOTH
def test_a_fresh_process_loads_it_without_a_dense_table(config, tmp_path):
    model = small(config=config)
    folder = save_pretrained(model, tmp_path / "out")
    torch.save(logits(model), tmp_path / "logits.pt")
    assert python(LOAD, folder, tmp_path / "logits.pt") == "True True []"


def test_the_format_version_rises_only_where_a_table_is_stored(tmp_path):
    plain = save_pretrained(pack_randomly(tiny_llama()), tmp_path / "plain")
    table = save_pretrained(small(), tmp_path / "table")
    settings = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (plain, table)
    ]
    assert settings[0]["format_version"] == 1 and "tables" not in settings[0]
    assert settings[1]["format_version"] == 2
    entry = {"bits": 4, "group_size": 32}
    assert settings[1]["tables"] == {"model.embed_tokens": entry, "lm_head": entry}
