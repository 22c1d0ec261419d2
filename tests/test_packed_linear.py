import copy

import needs
import pytest
import torch
from packed_models import random_factors
from torch.nn import functional as F

from nanoquant.binary import BinaryFactors
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.packed_linear import PackedBinaryLinear

SHAPES = [(24, 40, 16), (17, 23, 5)]  # d_out, d_in, rank


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_layer_computes_what_its_dense_weight_computes(shape):
    factors, bias = random_factors(*shape), torch.randn(shape[0])
    layer = PackedBinaryLinear.from_factors(factors, bias, torch.float32)
    torch.testing.assert_close(layer.dequantize(), factors.dense())
    x = torch.randn(2, 3, shape[1])
    torch.testing.assert_close(layer(x), F.linear(x, factors.dense(), bias))


def test_packed_layer_agrees_with_the_latent_and_the_frozen_layer():
    latent = BinaryLowRankLinear.from_factors(random_factors(24, 40, 16), torch.randn(24))
    x = torch.randn(5, 40)
    expected = latent(x).detach()
    for layer in (latent, latent.freeze()):
        packed = PackedBinaryLinear.from_factors(layer.factors(), layer.bias, torch.float32)
        torch.testing.assert_close(packed(x), expected)


def test_bits_are_those_of_the_tensors_and_of_the_formula():
    layer = PackedBinaryLinear.from_factors(random_factors(64, 96, 32), torch.zeros(64))
    assert layer.bits == (32 + 16) * (64 + 96)
    assert "rank=32" in repr(layer) and "bits=1.250" in repr(layer)


def test_latent_layer_announces_the_bits_that_the_packed_one_takes():
    latent = BinaryLowRankLinear(96, 64, 32)
    assert PackedBinaryLinear.from_factors(latent.factors()).bits == latent.bits


def test_weight_is_a_packed_tensor_over_the_same_storage():
    layer = PackedBinaryLinear.from_factors(random_factors(24, 40, 16))
    weight = layer.weight
    assert weight.shape == (24, 40) and weight.dtype == torch.bfloat16
    for part in ("u_signs", "v_signs", "s1", "s2"):
        assert getattr(weight, part).data_ptr() == getattr(layer, part).data_ptr()
    x = torch.randn(2, 40)
    assert torch.equal(F.linear(x, weight), layer(x))
    again = PackedBinaryLinear.from_weight(weight)
    assert again.u_signs.data_ptr() == layer.u_signs.data_ptr() and torch.equal(again(x), layer(x))


def test_all_tensors_are_frozen_parameters_in_the_state_dict():
    layer = PackedBinaryLinear.from_factors(random_factors(24, 40, 16), torch.zeros(24))
    assert list(layer.state_dict()) == ["u_signs", "v_signs", "s1", "s2", "bias"]
    assert not any(p.requires_grad for p in layer.parameters()) and not list(layer.buffers())
    empty = PackedBinaryLinear(40, 24, 16, True)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(2, 40)
    assert torch.equal(empty(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_scales_and_bias_can_be_trained():
    layer = PackedBinaryLinear.from_factors(random_factors(24, 40, 16), torch.zeros(24))
    for name in ("s1", "s2", "bias"):
        getattr(layer, name).requires_grad_()
    layer(torch.randn(2, 40)).sum().backward()
    assert all(getattr(layer, name).grad.abs().sum() > 0 for name in ("s1", "s2", "bias"))


def test_moving_to_a_dtype_keeps_the_signs():
    layer = PackedBinaryLinear.from_factors(random_factors(24, 40, 16), scale_dtype=torch.float32)
    signs = layer.u_signs.clone()
    layer.to(torch.bfloat16)
    assert layer.s1.dtype == torch.bfloat16 and torch.equal(layer.u_signs, signs)


@needs.compiler
def test_compiled_layer_is_one_graph():
    layer = PackedBinaryLinear.from_factors(random_factors(24, 40, 16), torch.randn(24))
    x = torch.randn(2, 40)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("name", ["U", "s1", "s2"])
def test_a_value_that_is_not_finite_is_refused_by_name(name):
    factors = random_factors(24, 40, 16)
    getattr(factors, name).view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=name):
        PackedBinaryLinear.from_factors(factors)


def test_a_scale_that_overflows_is_refused():
    factors = random_factors(24, 40, 16)
    large = BinaryFactors(factors.U, factors.V, factors.s1 * 1e7, factors.s2)
    with pytest.raises(ValueError, match="s1 overflows torch.float16"):
        PackedBinaryLinear.from_factors(large, scale_dtype=torch.float16)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        PackedBinaryLinear(40, 24, 0, False)
