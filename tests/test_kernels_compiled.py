"""The CPU path that torch.compile generates gives the dense product, and takes over where the extension is missing."""

import functools
import logging

import needs
import pytest
import torch
from test_kernels_ops import arguments, expected

from nanoquant_kernels import binary_low_rank_linear, compiled, cpu, reference

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


@needs.compiler
def test_generated_code_gives_the_same_for_every_shape_and_is_generated_once(fresh, monkeypatch):
    monkeypatch.setattr(cpu, "available_paths", tuple)
    monkeypatch.setattr(reference, "binary_low_rank_linear", None)
    binary_low_rank_linear(*arguments(40, 96, 64, dtype=torch.bfloat16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in SHAPES:
            args = arguments(*shape, lead=(2,), dtype=torch.bfloat16)
            y, truth = binary_low_rank_linear(*args), expected(*args)
            assert (y.double() - truth).norm() <= ROUNDING[y.dtype] * truth.norm()
        args[0][1, 5] = float("nan")
        y = binary_low_rank_linear(*args)
    assert y[1].isnan().all() and y[0].isfinite().all()


def test_it_takes_few_tokens_and_rows_that_fill_its_loop(monkeypatch):
    monkeypatch.setattr(compiled, "works", lambda dtype: True)

    def serves(d_out, d_in, rank, **how):
        x, u_signs, v_signs, *_ = arguments(d_out, d_in, rank, **how)
        return compiled.serves(x, v_signs, u_signs, rank)

    assert serves(24, 96, 64, lead=(compiled.MOST_TOKENS,))
    assert not serves(24, 96, 64, lead=(compiled.MOST_TOKENS + 1,))
    assert not serves(24, 96, 64, dtype=torch.float64)
    assert not serves(23, 96, 64) and not serves(24, 96, 72) and not serves(24, 40, 64)
    assert not serves(4, 96, 64) and not serves(24, 32, 64) and not serves(24, 96, 32)


def test_why_nothing_can_be_generated_is_said_once(fresh, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "generated", functools.partial(_fail, "no compiler here"))
    with caplog.at_level(logging.WARNING):
        assert not compiled.works(torch.bfloat16) and not compiled.works(torch.bfloat16)
    assert caplog.text.count("no compiler here") == 1


def test_the_switch_of_torch_compile_is_obeyed(fresh, monkeypatch):
    monkeypatch.setattr(compiled, "generated", functools.partial(_fail, "was called"))
    with torch._dynamo.config.patch(disable=True):
        assert not compiled.works(torch.bfloat16)


def _fail(reason):
    raise RuntimeError(reason)
