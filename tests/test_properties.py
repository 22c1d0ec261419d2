"""Packing, budgets and layouts hold for any input, of which hypothesis draws some hundreds, the same in each run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoquant.budget import BudgetConfig, allocate_ranks, layer_bits, rank_limits, used_bits
from nanoquant.interchange.words import from_words, to_words
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.product_budget import ProductShape, plan_product, product_bits
from nanoquant.product_packed import PackedProductLinear
from nanoquant_kernels import (
    pack_codes,
    pack_indices,
    pack_signs,
    packed_width,
    unpack_codes,
    unpack_indices,
    unpack_signs,
)
from nanoquant_kernels.indices import WIDTHS, index_bytes
from nanoquant_kernels.layout import align_rows
from nanoquant_kernels.planes import as_words, from_planes, to_planes, words_of

SAME = settings(derandomize=True, deadline=None, max_examples=100)
SHAPES = st.lists(st.integers(0, 5), max_size=2).flatmap(
    lambda lead: st.integers(1, 150).map(lambda columns: (*lead, columns))
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32)
BITS = st.floats(0.3, 2.5, allow_nan=False)
LINEARS = st.dictionaries(
    st.sampled_from("qkvoudg"),
    st.tuples(st.integers(40, 600), st.integers(40, 600)),
    min_size=1,
)


def strided(tensor, seed):
    """The same values with other distances between them."""
    if seed % 3 == 0 and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    return torch.stack([tensor, tensor], -1)[..., 0] if seed % 3 == 1 else tensor


@SAME
@given(shape=SHAPES, dtype=DTYPES, seed=SEEDS)
def test_signs_of_any_shape_dtype_and_stride_come_back(shape, dtype, seed):
    signs = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = pack_signs(strided(signs, seed))
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], packed_width(shape[-1]))
    rows = packed.reshape(-1, packed.shape[-1])
    restored = unpack_signs(rows, shape[-1], dtype)
    assert torch.equal(restored.view(shape), torch.where(signs < 0, -1, 1).to(dtype))
    assert torch.equal(pack_signs(restored), rows)


@SAME
@given(shape=SHAPES, width=st.sampled_from(WIDTHS), seed=SEEDS)
def test_indices_of_any_width_come_back_in_exactly_their_bytes(shape, width, seed):
    indices = torch.randint(
        2**width, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    packed = pack_indices(strided(indices, seed), width)
    assert packed.shape == (*shape[:-1], index_bytes(shape[-1], width))
    assert index_bytes(shape[-1], width) == -(-shape[-1] * width // 8)
    assert torch.equal(unpack_indices(packed, shape[-1], width), indices)


@SAME
@given(rows=st.integers(0, 9), columns=st.integers(1, 60), seed=SEEDS)
def test_codes_of_4_bits_come_back(rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, 32 * columns), generator=g, dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.nbytes == rows * 16 * columns
    assert torch.equal(unpack_codes(packed), codes)


@SAME
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), seed=SEEDS)
def test_rows_keep_their_bytes_in_words_and_when_they_are_aligned(rows, columns, seed):
    packed = pack_signs(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(from_words(to_words(packed, columns), columns, "U"), packed)
    assert torch.equal(align_rows(packed), packed)


@SAME
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), seed=SEEDS)
def test_planes_are_another_order_of_the_same_columns(rows, columns, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    planes = to_planes(x)
    assert torch.equal(from_planes(planes, columns), x)
    words = as_words(pack_signs(x)).to(torch.int32) & 0xFFFF
    assert words.shape == (rows, words_of(columns))
    bits = torch.stack([words >> bit & 1 for bit in range(16)], -1).flatten(1)[:, :columns]
    assert torch.equal(bits == 1, x < 0)


@SAME
@given(d_out=st.integers(1, 400), d_in=st.integers(1, 400), rank=st.integers(1, 300))
def test_the_bits_of_a_layer_are_those_of_its_tensors(d_out, d_in, rank):
    layer = PackedBinaryLinear(d_in, d_out, rank, False, "meta")
    stored = 8 * sum(p.numel() * p.element_size() for p in layer.parameters())
    assert layer.bits == stored
    if d_in % 8 == rank % 8 == 0:  # rows fill their bytes
        assert layer_bits(d_out, d_in, rank) == stored


@SAME
@given(
    groups=st.integers(20, 80),
    d_out=st.integers(16, 200),
    width=st.sampled_from((4, 6)),
    seed=SEEDS,
)
def test_the_bits_of_codebooks_are_those_of_their_tensors(groups, d_out, width, seed):
    shape = ProductShape(8, (width, 4)[: 1 + seed % 2], 2 if d_out % 2 == 0 else 1)
    d_in = 8 * groups - seed % 8
    layer = PackedProductLinear(d_in, d_out, shape, False, "meta")
    stored = 8 * sum(p.numel() * p.element_size() for p in layer.parameters())
    assert product_bits(d_out, d_in, shape) == layer.bits == stored


def allocated(shapes, bits, step):
    """Ranks, or None where these bits are none that these shapes can meet."""
    try:
        return allocate_ranks(shapes, BudgetConfig(bits=bits, rank_multiple=step))
    except ValueError:
        return None


@SAME
@given(shapes=LINEARS, bits=BITS, step=st.sampled_from((1, 8, 32)))
def test_ranks_keep_to_the_budget_and_what_is_left_buys_no_further_step(shapes, bits, step):
    ranks = allocated(shapes, bits, step)
    if ranks is None:
        return
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    used = used_bits(shapes, ranks)
    assert used <= bits * weights
    limits = rank_limits(shapes, BudgetConfig(bits=bits, rank_multiple=step))
    for name, (d_out, d_in) in shapes.items():
        assert ranks[name] % step == 0
        more = layer_bits(d_out, d_in, ranks[name] + step) - layer_bits(d_out, d_in, ranks[name])
        full = ranks[name] + step > limits.cap[name]
        assert full or used + more > bits * weights


@SAME
@given(shapes=LINEARS, bits=BITS, more=st.floats(0, 0.5))
def test_more_bits_are_never_used_for_fewer(shapes, bits, more):
    few, many = allocated(shapes, bits, 8), allocated(shapes, bits + more, 8)
    if few is not None and many is not None:
        step = max(layer_bits(*shape, 16) - layer_bits(*shape, 8) for shape in shapes.values())
        assert used_bits(shapes, many) > used_bits(shapes, few) - step


@SAME
@given(shapes=LINEARS, bits=BITS)
def test_codebooks_keep_to_the_budget(shapes, bits):
    try:
        chosen = plan_product(shapes, bits)
    except ValueError:
        return
    used = sum(product_bits(*shapes[name], shape) for name, shape in chosen.items())
    assert used <= bits * sum(d_out * d_in for d_out, d_in in shapes.values())
    assert chosen == plan_product(shapes, bits)


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf")])
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        allocate_ranks({"q": (64, 64)}, BudgetConfig(bits=bits))
