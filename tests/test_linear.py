"""BinaryLowRankLinear computes what its factors say, latent, frozen and packed."""

import pytest
import torch
from torch.nn import functional as F

from nanoquant.binary import BinaryFactors, sign
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.packed_linear import PackedBinaryLinear

# relative to the largest output: float32 sums in another order, bfloat16 rounds every step
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random_layer(d_in=40, d_out=24, rank=17, bias=True):
    generator = torch.manual_seed(0)
    U, V = (
        torch.randn(d_out, rank, generator=generator),
        torch.randn(d_in, rank, generator=generator),
    )
    s1, s2 = ((torch.rand(n, generator=generator) + 0.5).bfloat16().float() for n in (d_out, d_in))
    b = torch.randn(d_out, generator=generator) if bias else None
    return BinaryLowRankLinear.from_factors(BinaryFactors(U, V, s1, s2), b)


def random_input(dtype, d_in=40):
    return torch.randn(2, 3, d_in, generator=torch.manual_seed(1)).to(dtype)


def assert_close(a, b, dtype):
    scale = b.float().abs().max()
    assert (a.float() - b.float()).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_latent_frozen_packed_and_dense_agree(dtype, bias):
    layer, x = random_layer(bias=bias), random_input(dtype)
    weight, b = layer.factors().dense(), layer.bias
    dense = F.linear(x.float(), weight, b)
    latent = layer(x)
    assert latent.dtype == dtype
    assert_close(latent, dense, dtype)
    assert torch.equal(layer.freeze()(x), latent)
    packed = PackedBinaryLinear.from_factors(layer.factors(), None if b is None else b.detach())
    assert_close(packed(x), dense, dtype)


def test_autocast_computes_in_its_dtype():
    layer, x = random_layer(), random_input(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_gradients_reach_latents_as_if_signs_were_the_latents():
    layer, x = random_layer(), random_input(torch.float32)
    layer(x).square().sum().backward()
    f = layer.factors()
    U, V = sign(f.U).requires_grad_(), sign(f.V).requires_grad_()
    weight = f.s1.unsqueeze(-1) * (U @ V.mT) * f.s2
    F.linear(x, weight, layer.bias).square().sum().backward()
    torch.testing.assert_close(layer.U.grad, U.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.V.grad, V.grad, rtol=1e-4, atol=1e-3)
    assert layer.s1.grad is not None and layer.s2.grad is not None and layer.bias.grad is not None


def test_bits_are_the_stored_signs_and_16_bit_scales():
    layer = random_layer(d_in=48, d_out=24, rank=16)
    assert layer.bits == 16 * (48 + 24) + 16 * (48 + 24)
    assert PackedBinaryLinear.from_factors(layer.factors()).bits == layer.bits


def test_frozen_signs_do_not_train_and_scales_do():
    layer = random_layer().freeze()
    assert layer.frozen
    assert {name for name, _ in layer.named_parameters()} == {"s1", "s2", "bias"}
    assert {name for name, _ in layer.named_buffers()} == {"u_signs", "v_signs"}


def test_frozen_signs_take_a_bit_each_and_are_packed_as_they_are():
    latent, layer = random_layer(), random_layer().freeze()
    assert layer.u_signs.shape == (24, 3) and layer.v_signs.shape == (17, 5)
    assert {t.dtype for t in layer.buffers()} == {torch.uint8}
    packed = PackedBinaryLinear.from_frozen(layer)
    assert packed.u_signs.data_ptr() == layer.u_signs.data_ptr()
    for name, tensor in PackedBinaryLinear.from_factors(latent.factors()).state_dict().items():
        assert torch.equal(packed.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(40, 24, 17), (64, 48, 32)], ids=str)
def test_gradients_of_a_frozen_layer_are_those_of_the_plain_form(dtype, shape):
    found = []
    for frozen in (True, False):
        layer, x = random_layer(*shape), random_input(dtype, shape[0]).requires_grad_()
        out = (layer.freeze() if frozen else layer)(x)
        out.square().sum().backward()
        found.append([out, x.grad, layer.s1.grad, layer.s2.grad, layer.bias.grad])
    for packed, plain in zip(*found, strict=True):
        assert packed.dtype == plain.dtype
        assert_close(packed, plain, dtype)


def test_a_frozen_layer_keeps_no_unpacked_signs_for_the_backward_pass():
    layer, x = random_layer(1024, 512, 256).freeze(), random_input(torch.float32, 1024)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x.requires_grad_())
    signs = 256 * (1024 + 512)
    vectors = 4 * (6 * 1024 + 6 * 512) * 2 + 4 * (1024 + 512)  # inputs and outputs of products
    assert sum(kept.values()) <= signs // 8 + vectors < signs


def test_thaw_gives_trainable_latents_of_magnitude_one_with_the_same_signs():
    layer = random_layer()
    before = layer.factors().dense()
    layer.freeze().thaw()
    assert not layer.frozen and layer.U.requires_grad
    assert (layer.U.abs() == 1).all() and layer.U.dtype == torch.float32
    assert torch.equal(layer.factors().dense(), before)


def test_freeze_and_thaw_twice_change_nothing_more():
    layer = random_layer()
    U = layer.thaw().U
    assert U is layer.U
    signs = layer.freeze().u_signs
    assert layer.freeze().u_signs is signs


@pytest.mark.parametrize("freeze", [False, True], ids=["latent", "frozen"])
def test_state_dict_restores_the_layer(freeze):
    layer = random_layer()
    other = BinaryLowRankLinear(40, 24, 17)
    if freeze:
        layer.freeze(), other.freeze()
    other.load_state_dict(layer.state_dict())
    x = random_input(torch.float32)
    assert torch.equal(other(x), layer(x))


def test_a_new_layer_keeps_the_variance_of_its_input():
    torch.manual_seed(0)
    y = BinaryLowRankLinear(256, 128, 64)(torch.randn(64, 256))
    assert 0.5 < float(y.detach().var()) < 2


def test_repr_tells_shape_rank_bits_and_state():
    text = repr(random_layer())
    assert all(
        part in text
        for part in ("in_features=40", "out_features=24", "rank=17", "bits=2.375", "latent")
    )


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0)], ids=str)
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        BinaryLowRankLinear(*sizes)
