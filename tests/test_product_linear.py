"""ProductQuantLinear computes what its factors say, trains codebooks and scales, and chooses indices anew."""

import pytest
import torch
from torch.nn import functional as F

from nanoquant.importance import Importance
from nanoquant.layer_records import weight_error
from nanoquant.product import KMeansInitializer
from nanoquant.product_budget import ProductShape
from nanoquant.product_linear import ProductQuantLinear

SHAPES = [ProductShape(8, (4,)), ProductShape(5, (4, 6), 2)]
EVEN = Importance(torch.ones(96), torch.ones(64))


def weight_of(seed=0):
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)) * 0.1


def layer_of(shape=SHAPES[1], bias=True):
    factors = KMeansInitializer()(weight_of(), EVEN, shape)
    return ProductQuantLinear.from_factors(factors, torch.linspace(-1, 1, 64) if bias else None)


def random_input(seed=1, tokens=20):
    return torch.randn(tokens, 96, generator=torch.Generator().manual_seed(seed))


SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@SHAPE
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_layer_computes_with_the_weight_of_its_factors(shape, bias):
    layer, x = layer_of(shape, bias), random_input()
    dense = layer.factors().dense()
    assert float((dense - weight_of()).norm() / weight_of().norm()) < 0.85
    torch.testing.assert_close(layer(x), F.linear(x, dense, layer.bias))
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@SHAPE
def test_gradients_are_those_of_a_plain_look_up(shape):
    layer, x = layer_of(shape), random_input().requires_grad_()
    layer(x).square().sum().backward()
    f = layer.factors()
    books = [C.requires_grad_() for C in f.codebooks]
    scale, again = f.scale.requires_grad_(), x.detach().requires_grad_()
    F.linear(again, f.dense(), layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.scale.grad, scale.grad, rtol=1e-4, atol=1e-3)
    for own, book in zip((layer.codebook, layer.codebook2), books, strict=False):
        torch.testing.assert_close(own.grad, book.grad, rtol=1e-4, atol=1e-3)
    assert layer.bias.grad is not None


def test_training_codebooks_and_scales_lowers_the_loss_and_leaves_the_indices():
    layer, x = layer_of(), random_input(tokens=200)
    target = F.linear(x, weight_of())
    before = [layer.indices.clone(), layer.indices2.clone()]
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(layer.indices, before[0]) and torch.equal(layer.indices2, before[1])


@SHAPE
def test_indices_chosen_anew_fit_moved_codebooks_better(shape):
    layer, W = layer_of(shape), weight_of()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for book in (layer.codebook, layer.codebook2):
            if book is not None:
                book += 0.3 * torch.randn(book.shape, generator=g)
        layer.scale[3] = 0.0
        layer.scale[4] *= -1
    before = weight_error(W, layer.factors().dense(), EVEN)
    old = layer.indices
    changed = layer.reassign(W, EVEN, 8)
    assert 0.05 < changed <= 1 and layer.indices is not old
    assert weight_error(W, layer.factors().dense(), EVEN) < 0.95 * before
    layer.reassign(W, EVEN, 8)
    assert layer.reassign(W, EVEN, 8) == 0


def test_parameters_train_and_indices_are_packed_buffers():
    layer = layer_of(SHAPES[1])
    assert {n for n, _ in layer.named_parameters()} == {"codebook", "codebook2", "scale", "bias"}
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer.indices.shape == (64, 10) and layer.indices2.shape == (64, 15)  # 20 groups
    assert {b.dtype for b in layer.buffers()} == {torch.uint8}
    assert layer.frozen and layer.freeze() is layer
    one = layer_of(SHAPES[0], bias=False)
    assert set(one.state_dict()) == {"codebook", "scale", "indices"}


def test_bits_are_those_of_the_packed_tensors_and_16_bit_numbers():
    for shape in SHAPES:
        layer = layer_of(shape)
        stored = 8 * sum(b.numel() for b in layer.buffers())
        stored += 16 * sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
        assert layer.bits == layer.factors().bits == stored


def test_nothing_dense_is_kept_for_the_backward_pass():
    layer, x = layer_of(SHAPES[0]), random_input(tokens=2)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x.requires_grad_())
    assert sum(kept.values()) < 64 * 96 < 4 * 64 * 96


@SHAPE
def test_state_dict_restores_the_layer_also_by_assignment(shape):
    layer, x = layer_of(shape), random_input()
    for assign in (False, True):
        other = ProductQuantLinear(96, 64, shape, device="meta" if assign else None)
        other.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(other(x), layer(x))
        assert (other.indices.data_ptr() == layer.indices.data_ptr()) == assign


def test_a_new_layer_keeps_the_variance_of_its_input():
    torch.manual_seed(0)
    y = ProductQuantLinear(256, 128, ProductShape(8, (8, 4)))(torch.randn(64, 256))
    assert 0.5 < float(y.detach().var()) < 2


def test_repr_tells_shape_codebooks_and_bits():
    text = repr(layer_of(SHAPES[1]))
    for part in ("in_features=96", "out_features=64", "codebooks=5:4+6 x2", "bits="):
        assert part in text


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ProductQuantLinear(0, 64, SHAPES[0])
    with pytest.raises(ValueError, match="fewer than its 4096 entries"):
        ProductQuantLinear(96, 64, ProductShape(8, (12,)))
    with pytest.raises(ValueError, match="take a divisor of 64"):
        ProductQuantLinear(96, 64, ProductShape(8, (4,), 3))
    with pytest.raises(ValueError, match="non-finite"):
        layer_of().reassign(torch.full((64, 96), float("inf")), EVEN, 8)
