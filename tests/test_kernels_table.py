"""The head's product with a table of codes: layout, every path against float64, and what is refused."""

import math

import pytest
import torch

from nanoquant_kernels import pack_codes, table, table_linear, table_ops, table_rows, unpack_codes
from nanoquant_kernels.cpu_build import available_paths

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of the result only
SHAPES = [(40, 64, 2), (33, 96, 1), (1, 32, 1), (70, 576, 18)]  # n, d, groups
needs_compiler = pytest.mark.skipif(not available_paths(), reason="no C++ compiler")


def arguments(n, d, groups, bits, tokens=(3,), dtype=torch.float32, scale_dtype=None, bias=True):
    """x, codes, scales, zeros, bias; groups count at 4 bits only."""
    g = torch.Generator().manual_seed(n + d)
    scale_dtype = scale_dtype or dtype
    x = torch.randn(*tokens, d, generator=g).to(dtype)
    low, high = (-128, 128) if bits == 8 else (-8, 8)
    codes = torch.randint(low, high, (n, d), generator=g, dtype=torch.int8)
    columns = 1 if bits == 8 else groups
    scales = (0.01 + 0.01 * torch.rand(n, columns, generator=g)).to(scale_dtype)
    zeros = torch.randint(-8, 8, (n, columns), generator=g, dtype=torch.int8)
    added = torch.randn(n, generator=g).to(dtype) if bias else None
    if bits == 8:
        return x, codes, scales, None, added
    return x, pack_codes(codes), scales, zeros, added


def expected(x, codes, scales, zeros, bias):
    """The product in float64."""
    if zeros is not None:
        codes, zeros = unpack_codes(codes), zeros.double().unsqueeze(-1)
    values = codes.double().unflatten(-1, (scales.shape[1], -1)) - (0 if zeros is None else zeros)
    dense = (values * scales.double().unsqueeze(-1)).flatten(-2)
    return x.double() @ dense.T + (0 if bias is None else bias.double())


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


BITS = pytest.mark.parametrize("bits", [8, 4])


def test_codes_survive_packing_and_lie_as_documented():
    codes = torch.randint(-8, 8, (5, 96), dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.shape == (5, 48) and torch.equal(unpack_codes(packed), codes)
    for column in range(96):
        byte, high = column // 32 * 16 + column % 16, column % 32 >= 16
        assert torch.equal((packed[:, byte] >> 4 * high & 15).to(torch.int8) - 8, codes[:, column])


@BITS
def test_rows_are_those_of_the_dense_table(bits):
    _, codes, scales, zeros, _ = arguments(40, 64, 2, bits)
    dense = table.dense_rows(codes, scales, zeros)
    ids = torch.tensor([[3, 39, 0], [3, 7, 12]])
    assert torch.equal(table_rows(ids, codes, scales, zeros), dense[ids])
    assert table_rows(ids[:0], codes, scales, zeros).shape == (0, 3, 64)


@BITS
def test_the_reference_is_exact_in_chunks_as_well(bits, monkeypatch):
    monkeypatch.setitem(table.CHUNK, "cpu", 1000)
    args = arguments(70, 576, 18, bits)
    assert error(table.table_linear(*args), expected(*args)) <= ROUNDING[torch.float32]


@needs_compiler
@BITS
@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_dense_product(shape, dtype, path, bits):
    for tokens in (1, 2, 3, 4, 7):
        args = arguments(*shape, bits, (tokens,), dtype, bias=tokens % 2 == 0)
        y = table_ops.cpu_table_linear(*args, path=path)
        assert y.dtype == dtype and y.shape == (tokens, shape[0])
        assert error(y, expected(*args)) <= ROUNDING[dtype]


@needs_compiler
@pytest.mark.parametrize("path", available_paths())
@pytest.mark.parametrize("d", [1, 15, 17, 50])
def test_widths_that_fill_no_vector_work_at_8_bits(d, path):
    args = arguments(9, d, 1, 8)
    assert error(table_ops.cpu_table_linear(*args, path=path), expected(*args)) <= 1e-6


@needs_compiler
@BITS
@pytest.mark.parametrize("path", available_paths())
def test_what_is_not_finite_reaches_every_output_of_its_token_and_no_other(path, bits):
    args = list(arguments(40, 64, 2, bits, bias=False))
    args[0][1, 5] = math.nan
    y = table_ops.cpu_table_linear(*args, path=path)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@BITS
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_operator_is_right_with_and_without_a_compiler(bits, dtype, monkeypatch):
    for tokens in ((1,), (2, 3), (100,), (0,)):
        args = arguments(40, 64, 2, bits, tokens, dtype)
        truth = expected(*args)
        for paths in (available_paths(), ()):
            monkeypatch.setattr(table_ops, "available_paths", lambda paths=paths: paths)
            y = table_linear(*args)
            assert y.shape == (*tokens, 40) and y.dtype == dtype
            assert (y.double() - truth).norm() <= 2 * ROUNDING[dtype] * truth.norm() + 1e-12


@needs_compiler
@BITS
def test_threads_and_strides_do_not_change_a_bit(bits):
    x, *rest = arguments(2048, 576, 18, bits, (4,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(table_ops.cpu_table_linear(x, *rest))
    finally:
        torch.set_num_threads(before)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(*results) and torch.equal(table_linear(strided, *rest), results[0])


@BITS
def test_the_operator_passes_torchs_own_checks(bits):
    x, codes, scales, zeros, bias = arguments(40, 64, 2, bits)
    torch.library.opcheck(table_linear, (x.requires_grad_(), codes, scales, zeros, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(3, 60)}, "last dimension of 64"),
        ({0: torch.ones(3, 64, dtype=torch.int64)}, "floating point"),
        ({1: torch.zeros(40, 32)}, "codes must be"),
        ({2: torch.ones(40, 3)}, "do not fit"),
        ({2: torch.ones(39, 2)}, "do not fit"),
        ({3: None}, "do not fit"),
        ({3: torch.zeros(40, 2)}, "do not fit"),
        ({4: torch.zeros(39)}, "bias has shape"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(change, message):
    args = list(arguments(40, 64, 2, 4))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        table_linear(*args)


def test_a_bias_that_trains_gets_its_gradient():
    x, codes, scales, zeros, bias = arguments(40, 64, 2, 4)
    y = table_linear(x, codes, scales, zeros, bias.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, float(y[..., 0].numel())))
