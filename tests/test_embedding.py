"""Embedding and head at 8 or 4 bits: torchao's values, ties kept, sizes from bytes, bit for bit after a reload."""

import copy
import dataclasses
import io
import json

import pytest
import torch
from packed_models import pack_randomly
from tiny_models import (
    FAMILIES,
    random_windows,
    tiny_gemma3,
    tiny_llama,
    tiny_tokenizer,
)
from torch import nn
from torch.nn import functional as F
from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

from nanoquant.checkpoint import load, save_pretrained
from nanoquant.commands import inspect_command
from nanoquant.embedding import (
    EmbeddingConfig,
    QuantizedEmbedding,
    QuantizedHead,
    quantize_table,
)
from nanoquant.generate import greedy_sample
from nanoquant.model_embeddings import (
    dense_embeddings,
    find_embeddings,
    quantize_embeddings,
    quantized_tables,
)
from nanoquant.sizes import measure_sizes

WINDOWS = random_windows(2, 16)
EIGHT, FOUR = EmbeddingConfig(bits=8), EmbeddingConfig(bits=4)
BOTH = pytest.mark.parametrize("config", [EIGHT, FOUR], ids=["8", "4"])


def small(build=tiny_llama, config=FOUR, **options):
    """Packed body, quantized embedding and head."""
    return quantize_embeddings(pack_randomly(build(**options)), config)


@torch.no_grad()
def logits(model):
    return model(WINDOWS).logits


def simulated(model, config):
    """The model with embedding and head rounded by torchao alone, in dense matrices."""
    for module in find_embeddings(model).values():
        weight = module.weight.detach()
        eight = config.bits == 8
        rounded = IntxUnpackedToInt8Tensor.from_hp(
            weight,
            (1, weight.shape[1] if eight else config.group_size),
            torch.int8 if eight else torch.int4,
            mapping_type=MappingType.SYMMETRIC if eight else MappingType.ASYMMETRIC,
        )
        module.weight = nn.Parameter(rounded.dequantize())
    model.tie_weights()
    return model


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entries_are_those_of_torchao(config, dtype):
    weight = torch.randn(48, 96, generator=torch.manual_seed(0)).to(dtype)
    weight[3] = 0
    embedding = nn.Embedding.from_pretrained(weight.clone())
    quantized = QuantizedEmbedding.from_embedding(embedding, quantize_table(weight, config))
    eight = config.bits == 8
    rounded = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, 96 if eight else 32),
        torch.int8 if eight else torch.int4,
        mapping_type=MappingType.SYMMETRIC if eight else MappingType.ASYMMETRIC,
    )
    assert torch.equal(quantized(torch.arange(48)), rounded.dequantize())
    assert torch.equal(quantized.dequantize(), rounded.dequantize())
    worst = (quantized.dequantize() - weight).abs().amax() / weight.abs().amax()
    assert worst <= (0.006 if eight else 0.08)


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_the_rounded_values(family, config):
    model = FAMILIES[family]()
    expected = logits(simulated(copy.deepcopy(model), config))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    found = logits(quantize_embeddings(model, config))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    shared = model.get_output_embeddings().codes is model.get_input_embeddings().codes
    assert shared == tied


def test_an_embedding_that_scales_its_rows_keeps_its_forward():
    model = tiny_gemma3()
    dense = copy.deepcopy(model.get_input_embeddings())
    quantize_embeddings(model, FOUR)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, type(dense)) and isinstance(embedding, QuantizedEmbedding)
    rows = embedding.dequantize()[WINDOWS] * dense.embed_scale
    assert dense.embed_scale != 1 and torch.equal(embedding(WINDOWS), rows)


def test_sixteen_bits_change_nothing():
    model = pack_randomly(tiny_llama())
    before = dict(model.named_parameters())
    assert quantize_embeddings(model, EmbeddingConfig()) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)


@BOTH
def test_text_is_generated(config):
    model = small(config=config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    text = greedy_sample(model, tiny_tokenizer(), "the river", 8)
    assert text == greedy_sample(model, tiny_tokenizer(), "the river", 8)
    out = model.generate(WINDOWS[:, :4], max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 2 and out.shape[1] > 4


@BOTH
def test_a_dequantized_model_is_dense_tied_and_computes_the_same(config, tmp_path):
    model = quantize_embeddings(pack_randomly(tiny_llama(), scale_dtype=torch.float32), config)
    expected = logits(model)
    dense = load(save_pretrained(model, tmp_path / "out")).dequantize()
    assert type(dense.get_input_embeddings()) is nn.Embedding and not quantized_tables(dense)
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)


def test_gradients_pass_through_the_head_to_the_body():
    table = quantize_table(torch.randn(40, 64, generator=torch.manual_seed(0)), FOUR)
    head = QuantizedHead(table)
    x = torch.randn(3, 64, generator=torch.manual_seed(1), requires_grad=True)
    y = torch.randn(3, 40, generator=torch.manual_seed(2))
    (found,) = torch.autograd.grad((head(x) * y).sum(), x)
    (expected,) = torch.autograd.grad((F.linear(x, head.dequantize()) * y).sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_weight_that_others_see_has_shape_dtype_and_device_and_no_memory():
    model = small(dtype=torch.bfloat16)
    for module in find_embeddings(model).values():
        weight = module.weight
        assert weight.shape == (128, 64) and weight.dtype == torch.bfloat16
        assert weight.isnan().all() and weight.untyped_storage().nbytes() == 2


@pytest.mark.parametrize("bits", [3, 0, 32])
def test_other_bits_are_refused_with_the_allowed_ones(bits):
    with pytest.raises(ValueError, match=rf"must be 16, 8 or 4, got {bits}"):
        EmbeddingConfig(bits=bits)


@pytest.mark.parametrize("group_size", [0, 16, 48, -32])
def test_groups_that_do_not_fit_the_layout_are_refused(group_size):
    with pytest.raises(ValueError, match=rf"multiple of 32, got {group_size}"):
        EmbeddingConfig(group_size=group_size)


def test_a_group_that_does_not_divide_the_width_is_refused_before_anything_changes():
    model = tiny_llama()
    with pytest.raises(ValueError, match="group_size=96 does not divide the 64 columns.*32 or 64"):
        quantize_embeddings(model, EmbeddingConfig(bits=4, group_size=96))
    assert type(model.get_input_embeddings()) is nn.Embedding
    quantize_embeddings(model, EmbeddingConfig(bits=8, group_size=96))


def test_a_model_without_an_embedding_is_refused():
    model = tiny_llama()
    model.model.embed_tokens = nn.Identity()
    with pytest.raises(ValueError, match="found no token embedding in LlamaForCausalLM"):
        quantize_embeddings(model, EIGHT)


def test_a_head_that_is_no_linear_and_a_second_time_are_refused():
    model = tiny_llama(tie=False)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="head is a Sequential"):
        quantize_embeddings(model, EIGHT)
    with pytest.raises(ValueError, match="model.embed_tokens is quantized already"):
        quantize_embeddings(small(), FOUR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["tables"].update({"model.norm": {"bits": 8}}), "lists model.norm"),
        (lambda t: t["tables"].update({"lm_head": {"bits": 3}}), "needs bits, 8 or 4"),
        (lambda t: t["tables"].update({"lm_head": {"bits": 4}}), "group_size"),
        (lambda t: t["tables"]["model.embed_tokens"].update(group_size=64), "shape"),
        (lambda t: t.pop("tables"), "lacks"),
    ],
    ids=["foreign", "bits", "no group", "other group", "none"],
)
def test_a_configuration_that_does_not_fit_is_refused(change, message, tmp_path):
    folder = save_pretrained(small(), tmp_path / "out")
    content = json.loads((folder / "config.json").read_text())
    change(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3])
def test_a_whole_model_is_copied_and_pickled_whatever_its_embedding(build):
    model = small(build)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        embedding = again.get_input_embeddings()
        assert type(embedding) is type(model.get_input_embeddings())
        assert again.lm_head.codes is embedding.codes is not model.lm_head.codes
        assert torch.equal(logits(again), logits(model))


def test_rows_of_a_quantized_embedding_stay_as_many_as_they_are():
    model = small()
    before, embedding = logits(model), model.get_input_embeddings()
    for resized, change in (
        (model, {"new_num_tokens": 140}),
        (model.model, {"new_num_tokens": 100}),
        (copy.deepcopy(model), {"pad_to_multiple_of": 96}),
    ):
        with pytest.raises(
            ValueError, match=r"keeps its 128 rows, but 1\d\d are asked for; resize"
        ):
            resized.resize_token_embeddings(**change)
    for same in ({}, {"new_num_tokens": 128}, {"new_num_tokens": 100, "pad_to_multiple_of": 64}):
        assert model.resize_token_embeddings(**same) is embedding
    assert torch.equal(logits(model), before)


def test_a_model_that_is_dense_again_can_be_resized():
    model = small()
    dense_embeddings(model)
    assert model.resize_token_embeddings(140, mean_resizing=False).num_embeddings == 140
    assert logits(model).shape[-1] == 140 and logits(model).isfinite().all()


@BOTH
@pytest.mark.parametrize("build", [tiny_llama, tiny_gemma3])
def test_a_compiler_traces_the_whole_model_in_one_graph(build, config):
    model = small(build, config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(WINDOWS, use_cache=False).logits
    torch.testing.assert_close(found, logits(model))


def test_inspect_shows_bits_and_weights_of_the_embedding(tmp_path, capsys):
    folder = save_pretrained(small(dtype=torch.bfloat16), tmp_path / "out")
    inspect_command(str(folder))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {" ".join(words[:-1]): words[-1] for words in lines if words}
    assert rows["bits per weight, embedding and head"] == "4.7500"
    assert rows["weights in embedding and head"] == "8,192"


def test_sizes_without_tables_say_so():
    sizes = dataclasses.asdict(measure_sizes(tiny_llama()))
    assert sizes["embedding_bits_per_weight"] is None and sizes["embedding_weights"] == 0
