"""Models from a configuration alone: packed without a dense weight, sane activations, steps that a graph can hold."""

import dataclasses

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanoquant.benchmark.model import (
    DEVIATION,
    WARM_STEPS,
    Arm,
    Decoding,
    build,
    check_context,
    fill,
    memory_figures,
)
from nanoquant.benchmark.process import time_arms
from nanoquant.benchmark.setup import Target
from nanoquant.benchmark.shapes import linear_shapes, skeleton
from nanoquant.model_embeddings import quantized_tables
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.sizes import measure_sizes


def ranks_of(config, rank=32):
    return dict.fromkeys(linear_shapes(skeleton(config)), rank)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_of_any_family_has_no_dense_linear_and_finite_outputs(family):
    config = FAMILIES[family]().config
    ranks = ranks_of(config)
    model = build(config, ranks)
    assert all(parameter.is_meta for parameter in model.parameters())
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}
    assert packed == ranks.keys()
    model = fill(model, "cpu")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert set(linears) <= {"lm_head"} and model.dtype == torch.bfloat16
    logits = model(random_windows(1, 12)).logits
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt2"])
def test_norms_and_position_tables_are_those_of_the_family(family):
    config = FAMILIES[family]().config
    ours, theirs = fill(build(config, None), "cpu"), FAMILIES[family](dtype=torch.bfloat16)
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name
    for name, parameter in theirs.named_parameters():
        found = ours.get_parameter(name)
        if parameter.ndim == 1:
            assert torch.equal(found, parameter), name
        else:
            assert found.shape == parameter.shape and found.float().std() > 0.01


def test_a_tied_head_stays_tied():
    model = fill(build(tiny_llama(tie=True).config, None), "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_signs_past_the_last_column_are_zero_as_in_the_stored_layout():
    config = tiny_llama(intermediate_size=99).config
    model = fill(build(config, ranks_of(config, 13)), "cpu")
    down = model.model.layers[0].mlp.down_proj
    assert not (down.u_signs[:, -1] >> 5).any() and not (down.v_signs[:, -1] >> 3).any()
    assert down.u_signs.unique().numel() > 100 or down.u_signs.numel() < 200


class Noted(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_decoding_reads_no_value_back_so_a_graph_can_hold_it(packed):
    config = tiny_llama().config
    model = fill(build(config, ranks_of(config) if packed else None), "cpu")
    decoding = Decoding(model, context=5, steps=2)
    with Noted() as noted:
        decoding.advance()
    assert len(noted.names) > 20
    assert not [name for name in noted.names if "_local_scalar_dense" in name or "nonzero" in name]


def test_decoding_continues_as_a_forward_pass_without_a_cache_does():
    model = tiny_llama(tie=False)
    decoding = Decoding(model, context=6, steps=4)
    sequence = torch.arange(6)[None]
    for step in range(WARM_STEPS + 4):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], dim=-1)
        if step >= WARM_STEPS:
            decoding.advance()
        if step >= WARM_STEPS - 1:
            assert decoding.token.item() == sequence[0, -1]
    assert len(sequence[0, 6:].unique()) > 2


def test_memory_counts_the_weights_that_are_resident():
    model = fill(build(tiny_llama().config, None), "cpu")
    figures = memory_figures(model, None)
    assert figures == {"weight_bytes": measure_sizes(model).bytes_resident, "peak_bytes": None}


def test_an_arm_that_fails_or_is_too_slow_is_absent_with_the_reason():
    common = {
        "device": "cpu",
        "threads": 1,
        "seed": 0,
        "embedding_bits": 16,
        "context": 4,
        "repeats": 20,
    }
    config = tiny_llama().config
    slow = Arm(name="slow", config=config, ranks=ranks_of(config), most_seconds=1e-9, **common)
    wrong = {"model.layers.0.mlp.up_proj": 0}
    broken = dataclasses.replace(slow, name="broken", ranks=wrong)
    absent = {}
    assert time_arms([broken, slow], absent.__setitem__) == {}
    assert "must be at least 1" in absent["broken"] and "--most-seconds" in absent["slow"]


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_the_same_tensor_are_found_without_weights(family):
    config = FAMILIES[family]().config
    shapes = linear_shapes(skeleton(config))
    found = Target(family, config, config.num_hidden_layers, shapes, {}, {}).readers()
    assert sorted(name for names in found for name in names) == sorted(shapes)
    for names in found:
        assert len({shapes[name][1] for name in names}) == 1
    if family in ("llama", "qwen3"):
        assert [len(names) for names in found[:4]] == [3, 1, 2, 1]


def test_a_context_that_leaves_no_positions_for_the_steps_is_refused():
    config = tiny_llama(max_position_embeddings=100).config
    check_context("tiny", config, 74, 20)
    with pytest.raises(ValueError, match="need 101 positions, but tiny has 100.*at most 74"):
        check_context("tiny", config, 75, 20)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tie", [False, True])
def test_embedding_and_head_may_have_fewer_bits_in_a_packed_model(bits, tie):
    config = tiny_llama(tie=tie).config
    model = fill(build(config, ranks_of(config), bits), "cpu")
    tables = quantized_tables(model)
    assert set(tables) == {"model.embed_tokens", "lm_head"}
    assert (len({id(table.codes) for table in tables.values()}) == 1) is tie
    assert {table.bits for table in tables.values()} == {bits}
    sizes = measure_sizes(model)
    assert bits <= sizes.embedding_bits_per_weight < bits + 1.5
    dense = model.lm_head.dequantize().float()
    assert 0.5 * DEVIATION < dense.std() < 2 * DEVIATION
    assert Decoding(model, context=4, steps=1).seconds() > 0
    assert model(random_windows(1, 12)).logits.isfinite().all()
