import copy
import io
import subprocess
import sys

import needs
import pytest
import torch
from packed_models import random_factors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from nanoquant.packed_tensor import PackedBinaryTensor, flatten_state_dict, unflatten_state_dict


@pytest.fixture
def weight():
    return PackedBinaryTensor.from_factors(random_factors(24, 40, 16), torch.float32)


@pytest.fixture
def linear(weight):
    layer = nn.Linear(40, 24)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def assert_same(a, b):
    assert type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and a.rank == b.rank
    for part in PackedBinaryTensor.tensor_data_names:
        assert torch.equal(getattr(a, part), getattr(b, part)), part


def test_weight_shows_the_dense_shape_and_gives_the_dense_values(weight):
    assert weight.shape == (24, 40) and weight.dtype == torch.float32
    torch.testing.assert_close(weight.dequantize(), random_factors(24, 40, 16).dense())


def test_linear_computes_with_the_packed_weight(weight, linear):
    x = torch.randn(2, 3, 40)
    dense = weight.dequantize()
    torch.testing.assert_close(linear(x), F.linear(x, dense, linear.bias))
    torch.testing.assert_close(F.linear(x, weight, bias=linear.bias), linear(x))
    torch.testing.assert_close(F.linear(input=x, weight=weight), F.linear(x, dense))


def test_gradient_flows_to_the_input(weight, linear):
    x = torch.randn(2, 40, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, 40))


def test_repr_tells_shape_rank_and_bits(weight):
    text = repr(PackedBinaryTensor.from_factors(random_factors(64, 96, 32)))
    assert "shape=(64, 96)" in text and "rank=32" in text and "bits=1.250" in text
    assert weight.bits == 8 * (24 * 2 + 16 * 5) + 32 * (24 + 40)


def test_casting_casts_scales_and_keeps_signs(weight, linear):
    cast = weight.to(torch.bfloat16)
    assert cast.dtype == cast.s1.dtype == cast.s2.dtype == torch.bfloat16
    assert torch.equal(cast.u_signs, weight.u_signs) and cast.u_signs.dtype == torch.uint8
    linear.to(torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16
    assert linear(torch.randn(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_moving_alone_leaves_the_scales_as_they_are_stored():
    weight = PackedBinaryTensor.from_factors(random_factors(24, 40, 16), dtype=torch.float32)
    assert (weight.dtype, weight.s1.dtype) == (torch.float32, torch.bfloat16)
    assert weight.to("meta").s1.dtype == torch.bfloat16
    assert weight.to(torch.float64).s1.dtype == torch.float64


def test_casting_to_integers_is_refused(weight):
    with pytest.raises(ValueError, match="floating point"):
        weight.to(torch.int8)


def test_moving_to_meta_and_back_keeps_the_form(linear):
    linear.to("meta")
    assert isinstance(linear.weight, PackedBinaryTensor) and linear.weight.u_signs.is_meta
    linear.to_empty(device="cpu")
    assert linear.weight.u_signs.device.type == "cpu" and linear.weight.rank == 16


def test_deep_copies_are_equal_and_independent(linear):
    other = copy.deepcopy(linear)
    assert_same(other.weight, linear.weight)
    assert other.weight.u_signs.data_ptr() != linear.weight.u_signs.data_ptr()


def test_state_dict_goes_round(linear):
    other = nn.Linear(40, 24)
    zeros = random_factors(24, 40, 16, seed=1)
    other.weight = nn.Parameter(
        PackedBinaryTensor.from_factors(zeros, torch.float32), requires_grad=False
    )
    other.load_state_dict(linear.state_dict())
    assert_same(other.weight, linear.weight)
    dense = nn.Linear(40, 24)
    dense.load_state_dict(linear.state_dict(), assign=True)
    assert_same(dense.weight.detach(), linear.weight.detach())


def test_torch_save_goes_round_with_weights_only(linear):
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True)["weight"], linear.weight.detach())


LOAD = """
import sys, torch, nanoquant
print("torchao" in sys.modules)
from nanoquant import PackedBinaryTensor
print(type(torch.load(sys.argv[1], weights_only=True)["weight"]) is PackedBinaryTensor)
"""


def test_a_fresh_process_loads_it_with_weights_only_as_the_docstring_says(linear, tmp_path):
    assert "``from nanoquant import PackedBinaryTensor``" in PackedBinaryTensor.__doc__
    torch.save(linear.state_dict(), tmp_path / "a.pt")
    command = [sys.executable, "-c", LOAD, tmp_path / "a.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_safetensors_goes_round(linear, tmp_path):
    tensors, metadata = flatten_state_dict(linear.state_dict())
    assert set(tensors) == {"bias", *(f"weight.{p}" for p in PackedBinaryTensor.tensor_data_names)}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        restored = unflatten_state_dict(load_file(tmp_path / "a.safetensors"), file.metadata())
    assert_same(restored["weight"], linear.weight.detach())
    assert torch.equal(restored["bias"], linear.bias)


def test_a_missing_part_is_named(linear):
    tensors, metadata = flatten_state_dict(linear.state_dict())
    del tensors["weight.s2"]
    with pytest.raises(ValueError, match="weight.s2"):
        unflatten_state_dict(tensors, metadata)


@needs.compiler
def test_compiled_linear_is_one_graph_with_gradient(linear):
    x = torch.randn(2, 40, requires_grad=True)
    y = torch.compile(linear, fullgraph=True)(x)
    torch.testing.assert_close(y, linear(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(linear(x).sum(), x)[0])


def test_cache_key_depends_on_form_not_on_values(weight):
    other = PackedBinaryTensor.from_factors(random_factors(24, 40, 16, seed=1), torch.float32)
    wider = PackedBinaryTensor.from_factors(random_factors(24, 40, 17), torch.float32)
    assert weight._stable_hash_for_caching() == other._stable_hash_for_caching()
    assert weight._stable_hash_for_caching() != wider._stable_hash_for_caching()


def test_a_packed_tensor_cannot_be_the_input(weight):
    with pytest.raises(ValueError, match="not its input"):
        F.linear(weight, torch.randn(3, 40))
