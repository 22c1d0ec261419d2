"""A cut of a packed tensor is the same cut of its dense weight, or is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from packed_models import random_factors, random_look_ups
from torch import nn
from torch.nn import functional as F

from nanoquant.packed_tensor import PackedBinaryTensor
from nanoquant.product_budget import ProductShape
from nanoquant.product_tensor import PackedProductTensor

SHAPES = (ProductShape(4, (6,), 1), ProductShape(8, (4, 6), 4), ProductShape(4, (8,), 2))
STEPS = (8, 16, 32, 4)
"""Columns of each kind between which bytes begin."""


def weights():
    """Of each kind, whose last columns fill no byte or group."""
    yield PackedBinaryTensor.from_factors(random_factors(48, 101, 20), torch.float32)
    for shape in SHAPES:
        yield PackedProductTensor.from_factors(random_look_ups(48, 101, shape), torch.float32)


KINDS = pytest.mark.parametrize("number", range(4), ids=["signs", *map(str, SHAPES)])


@pytest.fixture
def weight(number):
    return list(weights())[number]


@KINDS
def test_rows_are_those_of_the_dense_weight(weight):
    dense, d_out = weight.dequantize(), 48
    cuts = {
        "narrow": lambda w: [w.narrow(0, 12, 12)],
        "slice": lambda w: [w[24:48], w[:12], w[-12:], w[24:24], w[:, :][24:36]],
        "chunk": lambda w: w.chunk(4),
        "split": lambda w: [*w.split(12), *w.split([24, 12, 12])],
    }
    for name, cut in cuts.items():
        for part, truth in zip(cut(weight), cut(dense), strict=True):
            assert type(part) is type(weight) and part.shape == truth.shape, name
            assert torch.equal(part.dequantize(), truth), name
    for row in (0, 13, d_out - 1, -1):
        assert torch.equal(weight.select(0, row), dense.select(0, row))
        assert torch.equal(weight[row], dense[row])


@KINDS
def test_rows_within_a_codebook_can_be_cut_anywhere(weight):
    dense = weight.dequantize()
    assert torch.equal(weight[13:17].dequantize(), dense[13:17])
    assert torch.equal(weight[7:8].dequantize(), dense[7:8])


@KINDS
def test_columns_are_those_of_the_dense_weight(weight, number):
    dense, step = weight.dequantize(), STEPS[number]
    assert weight.column_step == step
    cuts = {
        "narrow": lambda w: [w.narrow(1, step, 2 * step), w.narrow(-1, 0, 101)],
        "slice": lambda w: [w[:, :step], w[:, step:], w[12:24, 2 * step :], w[:, 500:], w[:, 3:3]],
        "split": lambda w: [*w.split(step, 1), *w.split([2 * step, 101 - 2 * step], -1)],
    }
    for name, cut in cuts.items():
        for part, truth in zip(cut(weight), cut(dense), strict=True):
            assert type(part) is type(weight) and part.shape == truth.shape, name
            assert torch.equal(part.dequantize(), truth), name
    for column in (0, 13, 100, -1):
        assert torch.equal(weight.select(1, column), dense.select(1, column))
        assert torch.equal(weight[:, column], dense[:, column])


@KINDS
def test_cuts_multiply_like_those_of_the_dense_weight(weight, number):
    step = STEPS[number]
    for part in (weight[12:24], weight[:, step : 3 * step], weight[:, step:]):
        x, bias = torch.randn(3, part.shape[1]), torch.randn(len(part))
        truth = F.linear(x, part.dequantize(), bias)
        torch.testing.assert_close(F.linear(x, part, bias), truth, rtol=1e-4, atol=1e-4)


@KINDS
def test_cuts_share_memory_and_a_cut_of_a_cut_is_a_cut(weight, number):
    step = STEPS[number]
    part = weight[:24][12:, step:]
    assert torch.equal(part.dequantize(), weight.dequantize()[12:24, step:])
    for name, stored in part.parts().items():
        if stored is not None:
            whole = weight.parts()[name]
            assert stored.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), name


@KINDS
def test_columns_within_a_byte_are_refused_with_what_is_allowed(weight, number):
    step = STEPS[number]
    message = rf"got columns 0:{step + 1} of a {type(weight).__name__}.* multiples of {step} alone.*dequantize"
    with pytest.raises(ValueError, match=message):
        weight[:, : step + 1]
    with pytest.raises(ValueError, match="ColwiseParallel"):
        weight.chunk(4, dim=1)  # 26 columns each


def test_rows_over_several_codebooks_are_refused_with_what_is_allowed():
    weight = list(weights())[2]
    with pytest.raises(
        ValueError, match=r"rows 6:20 .* serve 12 rows each; cut at multiples of 12"
    ):
        weight[6:20]


@KINDS
def test_what_a_packed_weight_cannot_do_is_named_with_what_it_can(weight):
    with pytest.raises(ValueError, match="step 1 alone, got 2"):
        weight[::2]
    with pytest.raises(ValueError, match="no view of shape"):
        weight.view(24, 202)
    with pytest.raises(IndexError):
        weight.select(0, 48)
    for function in (lambda: weight + 1, lambda: torch.cat([weight, weight])):
        with pytest.raises(NotImplementedError, match=r"aten.*dequantize\(\) for anything else"):
            function()


@KINDS
def test_transposed_it_multiplies_like_the_dense_one_and_comes_back(weight):
    x, bias, dense = torch.randn(3, 101), torch.randn(48), weight.dequantize()
    turned = weight.t()
    assert turned.shape == (101, 48) and turned.dtype == weight.dtype
    assert turned.stride() == dense.t().stride() and torch.equal(turned.t().dequantize(), dense)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.mm(x, turned), x @ dense.t(), **close)
    torch.testing.assert_close(torch.addmm(bias, x, turned), x @ dense.t() + bias, **close)
    y = torch.randn(3, 48)
    torch.testing.assert_close(torch.mm(y, weight), y @ dense, **close)


@KINDS
def test_what_would_be_another_result_is_refused(weight):
    x, bias = torch.randn(3, 101), torch.randn(48)
    with pytest.raises(ValueError, match="beta=1 and alpha=1, got 0 and 2"):
        torch.addmm(bias, x, weight.t(), beta=0, alpha=2)
    with pytest.raises(ValueError, match="right-hand side"):
        torch.mm(weight.t(), torch.randn(48, 3))
    with pytest.raises(ValueError, match="has the strides"):
        weight.as_strided((48, 101), (1, 48))
    for sizes in ([8, 8], [16, 48], [56, -8]):
        with pytest.raises(ValueError, match="add up to 48"):
            weight.split(sizes)


@KINDS
def test_shares_that_fsdp_cannot_make_are_refused_with_a_way_out(weight):
    with pytest.raises(ValueError, match=r"got zeros of shape \(10, 101\).*nanoquant.pack_model"):
        weight.new_zeros((10, 101))
    for size, dtype in (((12,), None), ((12, 101), torch.int64)):
        with pytest.raises(ValueError, match="for an equal share of the rows"):
            weight.new_zeros(size, dtype=dtype)
    five = SimpleNamespace(size=lambda: 5)
    with pytest.raises(ValueError, match=r"48 rows of a .* for 5 processes.*nanoquant.pack_model"):
        weight.fsdp_pre_all_gather(five, weight.shape, weight.stride(), nn.Linear(1, 1), None)


@KINDS
def test_zeros_for_fsdp_have_memory_of_their_own(weight):
    zeros, before = weight.new_zeros((12, 101)), weight.dequantize()
    zeros.copy_(weight[12:24])
    assert torch.equal(zeros.dequantize(), before[12:24])
    assert torch.equal(weight.dequantize(), before)
