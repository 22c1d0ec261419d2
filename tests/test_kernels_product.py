"""The product with a looked-up weight: every path against float64, gradients against autograd, what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from nanoquant_kernels import cpu_product, pack_indices, product, product_linear, unpack_indices
from nanoquant_kernels.cpu_build import available_paths

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CASES = {  # d_out, d_in, group, widths, slabs
    "one stage": (40, 64, 8, (8,), 1),
    "two stages": (48, 96, 8, (4, 4), 3),
    "mixed widths": (64, 96, 4, (6, 4), 1),
    "ragged": (33, 50, 8, (4,), 1),
    "ragged slabs": (36, 53, 3, (6, 10), 2),
    "wide": (24, 128, 16, (12,), 1),
    "single inputs": (20, 30, 1, (4,), 4),
    "one row": (1, 200, 5, (4,), 1),
    "several panels": (70, 4500, 4, (8, 6), 1),
    "nibbles of many rows": (100, 1100, 8, (4, 4), 2),
}


def arguments(d_out, d_in, group, widths, slabs, lead=(3,), dtype=torch.float32, bias=True):
    """x, indices, codebook, indices2, codebook2, scale, bias."""
    g = torch.Generator().manual_seed(d_out + d_in)
    groups = -(-d_in // group)
    stages = []
    for width in widths:
        k = torch.randint(0, 2**width, (d_out, groups), generator=g)
        book = torch.randn(slabs, 2**width, group, generator=g)
        stages += [pack_indices(k, width), book.to(dtype)]
    stages += [None] * (4 - len(stages))
    x = torch.randn(*lead, d_in, generator=g).to(dtype)
    scale = (torch.rand(d_out, generator=g) + 0.5).to(dtype)
    return x, *stages, scale, torch.randn(d_out, generator=g).to(dtype) if bias else None


def dense(indices, codebook, indices2, codebook2, scale, d_in):
    """The weight (d_out, d_in) in float64, group by group."""
    total = 0.0
    for packed, book in ((indices, codebook), (indices2, codebook2)):
        if packed is None:
            continue
        R, K, g = book.shape
        k = unpack_indices(packed, -(-d_in // g), int(math.log2(K))).long()
        slabs = [book[r].double()[part] for r, part in enumerate(k.chunk(R))]
        total = total + torch.cat(slabs).flatten(-2)[:, :d_in]
    return total * scale.double().unsqueeze(-1)


def expected(x, *rest):
    *weight, bias = rest
    y = x.double() @ dense(*weight, x.shape[-1]).T
    return y if bias is None else y + bias.double()


def error(found, truth):
    return ((found.double() - truth).norm() / truth.norm()).item()


needs_compiler = pytest.mark.skipif(not available_paths(), reason="no C++ compiler")
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@CASE
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("chunk", [1, 2**21])
def test_the_reference_gives_the_dense_product_in_chunks_of_any_size(
    monkeypatch, case, dtype, chunk
):
    monkeypatch.setitem(product.CHUNK, "cpu", chunk)
    for lead, bias in (((3,), True), ((), False), ((2, 5), True)):
        args = arguments(*case, lead=lead, dtype=dtype, bias=bias)
        y = product.product_linear(*args)
        assert y.dtype == dtype and y.shape == (*lead, case[0])
        assert error(y, expected(*args)) <= ROUNDING[dtype]


@CASE
def test_the_dense_weight_is_exact(case):
    x, *weight, _ = arguments(*case)
    found = product.dequantize(*weight, x.shape[-1])
    torch.testing.assert_close(found.double(), dense(*weight, x.shape[-1]), rtol=1e-6, atol=1e-6)


@CASE
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_operator_gives_the_dense_product(case, dtype):
    for lead in ((), (1,), (2, 3), (100,), (0,)):
        args = arguments(*case, lead=lead, dtype=dtype)
        y, truth = product_linear(*args), expected(*args)
        assert y.shape == (*lead, case[0]) and y.dtype == dtype
        assert (y.double() - truth).norm() <= ROUNDING[dtype] * truth.norm() + 1e-12


@needs_compiler
@pytest.mark.parametrize("path", available_paths())
@CASE
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_path_of_the_cpu_gives_the_dense_product(case, dtype, path):
    for tokens in (1, 2, 5):
        args = arguments(*case, lead=(tokens,), dtype=dtype, bias=tokens % 2 == 0)
        y = cpu_product.product_linear(*args, path=path)
        assert y.dtype == dtype and y.shape == (tokens, case[0])
        assert error(y, expected(*args)) <= ROUNDING[dtype]


@needs_compiler
@pytest.mark.parametrize("path", available_paths())
@CASE
def test_on_every_path_what_is_not_finite_reaches_every_output_of_its_token_alone(case, path):
    args = list(arguments(*case))
    args[0][1, 5] = math.nan
    y = cpu_product.product_linear(*args, path=path)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@needs_compiler
def test_threads_and_strides_do_not_change_a_bit():
    x, *rest = arguments(2048, 576, 8, (4, 8), 2, (4,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cpu_product.product_linear(x, *rest))
    finally:
        torch.set_num_threads(before)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(*results) and torch.equal(product_linear(strided, *rest), results[0])


@needs_compiler
def test_the_loop_serves_few_tokens_whose_tables_pay():
    assert cpu_product.serves(*arguments(576, 576, 8, (8,), 1, (1,)))
    assert not cpu_product.serves(*arguments(576, 576, 8, (8,), 1, (9,)))
    assert not cpu_product.serves(*arguments(576, 576, 8, (12,), 1, (1,)))
    assert not cpu_product.serves(*arguments(576, 576, 8, (8,), 1, (1,), torch.float64))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_operator_is_right_without_a_compiler(dtype, monkeypatch):
    monkeypatch.setattr(cpu_product, "available_paths", tuple)
    args = arguments(*CASES["two stages"], dtype=dtype)
    assert error(product_linear(*args), expected(*args)) <= ROUNDING[dtype]


@CASE
def test_gradients_are_those_of_the_dense_form(case, monkeypatch):
    monkeypatch.setitem(product.CHUNK, "cpu", 500)
    args = [t.double() if t is not None and t.is_floating_point() else t for t in arguments(*case)]
    found = []
    for function in (product_linear, expected):
        leaves = [
            t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in args
        ]
        function(*leaves).square().sum().backward()
        found.append([t.grad for t in leaves if t is not None and t.is_floating_point()])
    for own, truth in zip(*found, strict=True):
        torch.testing.assert_close(own, truth)


def test_the_operator_passes_torchs_own_checks():
    for name in ("one stage", "two stages"):
        args = arguments(*CASES[name])
        torch.library.opcheck(torch.ops.nanoquant.product_linear.default, args)
        trained = [
            t.requires_grad_() if t is not None and t.is_floating_point() else t for t in args
        ]
        torch.library.opcheck(torch.ops.nanoquant.product_linear.default, trained)


def test_autocast_computes_in_its_dtype():
    args = arguments(*CASES["two stages"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = product_linear(*args)
    assert y.dtype == torch.bfloat16 and error(y, expected(*args)) <= ROUNDING[torch.bfloat16]


def test_codebook_gradients_in_bfloat16_are_summed_in_float32():
    args = list(arguments(4096, 16, 8, (4,), 1, lead=(1,), dtype=torch.bfloat16, bias=False))
    args[0] = torch.ones_like(args[0])
    args[2], args[5] = args[2].requires_grad_(), torch.ones_like(args[5])
    product_linear(*args).sum().backward()
    numbers = unpack_indices(args[1], 2, 4).flatten().long()
    counts = torch.bincount(numbers, minlength=16).to(
        torch.bfloat16
    )  # bfloat16 sums would stop at 256
    assert torch.equal(args[2].grad[0], counts.unsqueeze(-1).expand(16, 8))


def test_what_is_not_finite_reaches_every_output_of_its_token_and_no_other():
    args = list(arguments(*CASES["one stage"]))
    args[0][1, 5] = math.nan
    y = product_linear(*args)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 80)}, r"indices must be uint8 \(48, 5\)"),
        ({0: torch.ones(3, 96, dtype=torch.int64)}, "x must be floating point"),
        ({1: torch.zeros(48, 6)}, "indices must be uint8"),
        ({2: torch.zeros(3, 15, 8)}, r"codebook must be \(slabs, entries, group\)"),
        ({2: torch.zeros(5, 16, 8)}, "5 slabs, which do not divide 48"),
        ({3: None}, "give both or none"),
        ({3: torch.zeros(48, 7, dtype=torch.uint8)}, "indices2 must be uint8"),
        ({4: torch.zeros(1, 16, 8)}, "slabs and group must be those"),
        ({5: torch.ones(48, 1)}, "scale must be a vector"),
        ({6: torch.zeros(47)}, "bias has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_named(change, message):
    args = list(arguments(*CASES["two stages"]))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        product_linear(*args)


def test_f_linear_is_what_it_stands_for():
    x, *weight, bias = arguments(*CASES["mixed widths"])
    truth = F.linear(x, product.dequantize(*weight, 96), bias)
    torch.testing.assert_close(product_linear(x, *weight, bias), truth)
