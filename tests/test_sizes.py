import dataclasses
import json

import pytest
import torch
from packed_models import pack_randomly
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn

from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.sizes import measure_sizes


def blocks_weights(model):
    return sum(p.numel() for n, p in model.named_parameters() if "proj" in n)


def test_dense_model_has_the_bits_of_its_dtype_and_no_body():
    sizes = measure_sizes(tiny_llama(dtype=torch.bfloat16))
    assert sizes.model_bits_per_parameter == 16 and sizes.body_bits_per_weight is None
    assert sizes.bytes_on_disk == 2 * sizes.parameters and sizes.body_weights == 0


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_figures_of_a_packed_model_follow_from_its_shapes(tie):
    dense = tiny_llama(tie=tie, dtype=torch.bfloat16)
    parameters, body = measure_sizes(dense).parameters, blocks_weights(dense)
    shapes = [m.weight.shape for m in dense.model.layers.modules() if isinstance(m, nn.Linear)]
    body_bits = sum((32 + 16) * (d_out + d_in) for d_out, d_in in shapes)
    sizes = measure_sizes(pack_randomly(dense))
    stored_bits = body_bits + 16 * (parameters - body)
    assert sizes.parameters == parameters and sizes.body_weights == body
    assert sizes.body_bits_per_weight == body_bits / body
    assert sizes.model_bits_per_parameter == stored_bits / parameters
    assert sizes.bytes_on_disk == stored_bits // 8


def test_a_tied_embedding_counts_once():
    tied, untied = measure_sizes(tiny_llama(tie=True)), measure_sizes(tiny_llama(tie=False))
    assert untied.parameters - tied.parameters == 128 * 64


def test_biases_belong_to_the_whole_model_not_to_the_body():
    model = pack_randomly(tiny_gpt2())
    sizes = measure_sizes(model)
    layers = [m for m in model.modules() if isinstance(m, PackedBinaryLinear)]
    assert sizes.body_bits_per_weight == sum(m.bits for m in layers) / sizes.body_weights
    assert sizes.bytes_on_disk == sum(p.numel() * p.element_size() for p in model.parameters())
    assert sizes.parameters == measure_sizes(tiny_gpt2()).parameters


def test_resident_bytes_add_the_buffers_that_are_not_stored():
    model = pack_randomly(tiny_llama())
    sizes = measure_sizes(model)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert buffers > 0 and sizes.bytes_resident == sizes.bytes_on_disk + buffers


def test_packed_weights_in_plain_linears_count_the_same():
    model = pack_randomly(tiny_llama())
    expected = measure_sizes(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedBinaryLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.weight, requires_grad=False)
            model.set_submodule(name, linear)
    assert measure_sizes(model) == expected


def test_sizes_are_plain_values_for_json():
    sizes = measure_sizes(pack_randomly(tiny_llama()))
    assert json.loads(json.dumps(sizes.to_dict())) == dataclasses.asdict(sizes)


def test_a_model_without_parameters_has_no_sizes():
    with pytest.raises(ValueError, match="no parameters"):
        measure_sizes(nn.ReLU())
