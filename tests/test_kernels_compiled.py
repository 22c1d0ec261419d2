"""The CPU path that torch.compile generates gives the dense product, and takes over where the extension is missing."""

import functools
import logging

import needs
import pytest
import torch
from test_kernels_ops import arguments, expected

from nanoquant_kernels import binary_low_rank_linear, compiled, cpu, reference
from nanoquant_kernels.layout import align_rows

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of the result only
SHAPES = [(24, 96, 64), (40, 576, 224), (12, 1088, 96), (96, 64, 1024)]  # d_out, d_in, rank


@pytest.fixture
def fresh():
    """The path as a new process sees it."""
    compiled.works.cache_clear()
    yield
    compiled.works.cache_clear()


@pytest.fixture
def uncompiled(monkeypatch):
    """The same code as plain PyTorch runs it."""
    monkeypatch.setattr(compiled, "generated", lambda: compiled.one_token)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_compiled_is_the_dense_product(shape, dtype, uncompiled):
    for lead, bias in (((3,), True), ((), False), ((0, 2), True)):
        args = arguments(*shape, lead=lead, dtype=dtype, bias=bias)
        y, truth = compiled.binary_low_rank_linear(*args), expected(*args)
        assert y.dtype == dtype and y.shape == (*lead, shape[0])
        assert (y.double() - truth).norm() <= ROUNDING[dtype] * truth.norm()


def test_rows_padded_for_a_gpu_and_views_give_the_same(uncompiled):
    x, u, v, *rest = arguments(24, 96, 64)
    wanted = compiled.binary_low_rank_linear(x, u, v, *rest)
    for change in (align_rows, lambda signs: torch.cat([signs[:1], signs])[1:]):
        assert torch.equal(compiled.binary_low_rank_linear(x, change(u), change(v), *rest), wanted)


def test_the_default_dtype_changes_nothing(uncompiled):
    args = arguments(24, 96, 64)
    wanted = compiled.binary_low_rank_linear(*args)
    compiled.plane_scales.cache_clear()
    torch.set_default_dtype(torch.float16)  # where 2^-30 is 0
    try:
        assert torch.equal(compiled.binary_low_rank_linear(*args), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@needs.compiler
def test_code_is_generated_once_for_every_shape_dtype_and_kind_of_tensor(fresh, monkeypatch):
    monkeypatch.setattr(cpu, "available_paths", tuple)
    assert compiled.works()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [*SHAPES, (64, 64, 64)]:
            for dtype, lead in (
                (torch.float32, (2,)),
                (torch.bfloat16, (1, 1)),
                (torch.float16, ()),
            ):
                args = arguments(*shape, lead=lead, dtype=dtype)
                y, truth = binary_low_rank_linear(*args), expected(*args)
                assert not torch.equal(y, reference.binary_low_rank_linear(*args))
                assert (y.double() - truth).norm() <= ROUNDING[dtype] * truth.norm()
        args = list(arguments(*SHAPES[0], lead=(2,)))
        args[1:5] = (torch.nn.Parameter(t, requires_grad=False) for t in args[1:5])
        wanted = binary_low_rank_linear(*args)
        with torch.inference_mode():
            inside = [args[0].clone(), *args[1:]]
            assert torch.equal(binary_low_rank_linear(*inside), wanted)
        args[0][1, 5] = float("nan")
        y = binary_low_rank_linear(*args)
    assert y[1].isnan().all() and y[0].isfinite().all()


def test_it_takes_few_tokens_and_rows_that_fill_its_loop(monkeypatch):
    monkeypatch.setattr(compiled, "works", lambda: True)

    def serves(d_out, d_in, rank, **how):
        return compiled.serves(arguments(d_out, d_in, rank, **how)[0], d_out, rank)

    assert serves(24, 96, 64, lead=(compiled.MOST_TOKENS,))
    assert not serves(24, 96, 64, lead=(compiled.MOST_TOKENS + 1,))
    assert not serves(24, 96, 64, dtype=torch.float64)
    assert not serves(23, 96, 64) and not serves(24, 96, 72) and not serves(24, 40, 64)
    assert not serves(4, 96, 64) and not serves(24, 32, 64) and not serves(24, 96, 32)


def test_why_nothing_can_be_generated_is_said_once(fresh, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "generated", functools.partial(_fail, "no compiler here"))
    with caplog.at_level(logging.WARNING):
        assert not compiled.works() and not compiled.works()
    assert caplog.text.count("no compiler here") == 1


def test_the_switch_of_torch_compile_is_obeyed(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "generated", functools.partial(_fail, "was called"))
    with torch._dynamo.config.patch(disable=True):
        assert not compiled.works()


def _fail(reason):
    raise RuntimeError(reason)
