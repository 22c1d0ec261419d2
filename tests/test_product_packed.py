"""The packed layer and torchao's tensor hold what the factors say, in true bits, and move and cast as weights do."""

import copy
import io

import needs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nanoquant.codebooks import ProductFactors
from nanoquant.product_budget import ProductShape
from nanoquant.product_linear import ProductQuantLinear
from nanoquant.product_packed import PARTS, PackedProductLinear
from nanoquant.product_tensor import PackedProductTensor

SHAPES = [ProductShape(8, (4,)), ProductShape(5, (4, 6), 2)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_factors(shape=SHAPES[1], d_out=64, d_in=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    books = [torch.randn(shape.slabs, K, shape.group, generator=g) for K in shape.entries]
    books = [book.bfloat16().float() for book in books]
    size = (d_out, shape.groups(d_in))
    indices = [torch.randint(0, K, size, generator=g, dtype=torch.int16) for K in shape.entries]
    scale = (torch.rand(d_out, generator=g) + 0.5).bfloat16().float()
    return ProductFactors(tuple(books), tuple(indices), scale, d_in)


def linear_of(shape=SHAPES[1], dtype=torch.float32):
    layer = nn.Linear(96, 64)
    weight = PackedProductTensor.from_factors(random_factors(shape), dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def assert_same(a, b):
    assert type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and a.d_in == b.d_in
    for name in PARTS:
        one, two = a.parts()[name], b.parts()[name]
        assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), name


@SHAPE
def test_layer_tensor_and_training_layer_hold_the_same_weight_and_bits(shape):
    f, bias = random_factors(shape), torch.linspace(-1, 1, 64)
    trained = ProductQuantLinear.from_factors(f, bias)
    packed = PackedProductLinear.from_factors(f, bias)
    tensor = packed.weight
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    truth = F.linear(x, f.dense(), bias)
    for y in (
        trained(x),
        packed(x),
        F.linear(x, tensor, bias),
        F.linear(input=x, weight=tensor, bias=bias),
    ):
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.dequantize().float(), f.dense(), rtol=1e-2, atol=1e-2)
    assert torch.equal(tensor.dequantize(), packed.dequantize())
    assert packed.bits == tensor.bits == trained.bits == f.bits


@SHAPE
def test_the_layer_is_of_frozen_parameters_and_goes_to_the_tensor_and_back_without_a_copy(shape):
    layer = PackedProductLinear.from_factors(random_factors(shape))
    names = [name for name in PARTS if len(shape.widths) == 2 or not name.endswith("2")]
    assert sorted(name for name, _ in layer.named_parameters()) == sorted(names)
    assert not any(p.requires_grad for p in layer.parameters()) and not list(layer.buffers())
    again = PackedProductLinear.from_weight(layer.weight)
    for name in names:
        assert getattr(again, name).data_ptr() == getattr(layer, name).data_ptr()
    empty = PackedProductLinear(96, 64, shape, False)
    empty.load_state_dict(layer.state_dict())
    assert_same(empty.weight, layer.weight)


def test_codebooks_and_scales_train_where_that_is_asked_for():
    layer = PackedProductLinear.from_factors(random_factors(), dtype=torch.float32)
    for part in (layer.codebook, layer.codebook2, layer.scale):
        part.requires_grad_()
    layer(torch.randn(4, 96)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (layer.codebook, layer.codebook2, layer.scale))


def test_gradient_flows_to_the_input():
    linear, x = linear_of(), torch.randn(2, 96, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.dequantize().sum(0).expand(2, 96))


@SHAPE
def test_casting_casts_codebooks_and_scales_and_keeps_indices(shape):
    weight = PackedProductTensor.from_factors(random_factors(shape), torch.float32)
    cast = weight.to(torch.bfloat16)
    assert cast.dtype == cast.codebook.dtype == cast.scale.dtype == torch.bfloat16
    assert torch.equal(cast.indices1, weight.indices1) and cast.indices1.dtype == torch.uint8
    shown = PackedProductTensor.from_factors(random_factors(shape), dtype=torch.float32)
    assert shown.to("meta").scale.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="floating point"):
        weight.to(torch.int8)


@SHAPE
def test_moving_copying_and_saving_keep_the_form(shape):
    linear = linear_of(shape)
    other = copy.deepcopy(linear)
    assert_same(other.weight, linear.weight)
    assert other.weight.indices1.data_ptr() != linear.weight.indices1.data_ptr()
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True)["weight"], linear.weight.detach())
    fresh = linear_of(shape)
    fresh.weight.scale.zero_()
    fresh.load_state_dict(linear.state_dict())
    assert_same(fresh.weight, linear.weight)
    linear.to("meta")
    assert isinstance(linear.weight, PackedProductTensor) and linear.weight.indices1.is_meta
    linear.to_empty(device="cpu")
    assert linear.weight.indices1.device.type == "cpu"


@needs.compiler
def test_compiled_linear_is_one_graph_with_gradient():
    linear, x = linear_of(), torch.randn(2, 96, requires_grad=True)
    y = torch.compile(linear, fullgraph=True)(x)
    torch.testing.assert_close(y, linear(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(linear(x).sum(), x)[0])


def test_cache_key_depends_on_form_not_on_values():
    keys = [
        PackedProductTensor.from_factors(random_factors(*a))._stable_hash_for_caching()
        for a in ((SHAPES[1],), (SHAPES[1], 64, 96, 1), (SHAPES[0],))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_reprs_tell_shape_codebooks_and_bits():
    layer = PackedProductLinear.from_factors(random_factors(SHAPES[0]))
    assert "codebooks=8:4" in repr(layer) and "bits=" in repr(layer)
    assert "codebooks=[(1, 16, 8)]" in repr(layer.weight) and "shape=(64, 96)" in repr(layer.weight)


@pytest.mark.parametrize("part", ["codebook", "codebook2", "scale"])
def test_what_is_not_finite_or_overflows_is_named(part):
    for value, dtype, message in (
        (float("nan"), torch.bfloat16, f"{part} holds a value that is not finite"),
        (1e6, torch.float16, f"{part} overflows torch.float16"),
    ):
        f = random_factors()
        {"codebook": f.codebooks[0], "codebook2": f.codebooks[-1], "scale": f.scale}[part].view(-1)[
            3
        ] = value
        with pytest.raises(ValueError, match=message):
            PackedProductLinear.from_factors(f, dtype=dtype)
    with pytest.raises(ValueError, match="bias holds a value"):
        PackedProductLinear.from_factors(random_factors(), torch.full((64,), float("inf")))


def test_a_packed_tensor_cannot_be_the_input():
    with pytest.raises(ValueError, match="not its input"):
        F.linear(linear_of().weight, torch.randn(3, 96))
