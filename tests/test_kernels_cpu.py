"""The compiled CPU loop gives the dense product on every instruction path, and nothing depends on its being there."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels_ops import arguments, expected, with_one_and_two_threads

from nanoquant_kernels import binary_low_rank_linear, compiled, cpu, cpu_build, reference

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}  # of the result only
SHAPES = [
    (24, 40, 16),
    (17, 23, 5),
    (1, 9, 1),
    (33, 1, 65),
    (96, 1100, 70),
    (48, 80, 144),
]  # d_out, d_in, rank
needs_compiler = pytest.mark.skipif(not cpu_build.available_paths(), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("path", cpu_build.available_paths())
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_dense_product(shape, dtype, path):
    for tokens in (1, 3):
        for bias in (True, False):
            args = arguments(*shape, lead=(tokens,), dtype=dtype, bias=bias)
            y, truth = cpu.binary_low_rank_linear(*args, path=path), expected(*args)
            assert y.dtype == dtype and y.shape == (tokens, shape[0])
            assert (y.double() - truth).norm() <= ROUNDING[dtype] * truth.norm()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_the_short_dtypes_is_read_and_rounded_right(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    one, plus = torch.ones(1), torch.zeros(1, 1, dtype=torch.uint8)
    for scale in (1.0, 1.0 + 2**-11, 3.0, 1e-3):
        y = cpu.binary_low_rank_linear(x, plus, plus, one * scale, one, None, 1)
        wanted = (x.float() * scale).to(dtype)
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y.nan_to_num(), wanted.nan_to_num())


@needs_compiler
@pytest.mark.parametrize("path", cpu_build.available_paths())
def test_what_is_not_a_number_reaches_every_output_of_its_token_and_no_other(path):
    args = list(arguments(48, 70, 40, lead=(3,)))
    args[0][1, 5] = float("nan")
    y = cpu.binary_low_rank_linear(*args, path=path)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@needs_compiler
def test_threads_do_not_change_a_bit():
    assert torch.equal(*with_one_and_two_threads(cpu.binary_low_rank_linear))


@needs_compiler
def test_views_and_empty_batches_work():
    x, *rest = arguments(24, 40, 16, lead=(4,))
    wide = torch.stack((x, x), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(
        cpu.binary_low_rank_linear(wide, *rest), cpu.binary_low_rank_linear(x, *rest)
    )
    assert cpu.binary_low_rank_linear(x[:0], *rest).shape == (0, 24)


@needs_compiler
def test_the_operator_takes_the_loop_for_few_tokens_of_known_dtypes(monkeypatch):
    calls = []
    inner = cpu.binary_low_rank_linear
    monkeypatch.setattr(
        cpu, "binary_low_rank_linear", lambda *a: (calls.append(len(a[0])), inner(*a))[1]
    )
    most = cpu.MOST_TOKENS[cpu_build.available_paths()[-1]]
    for tokens, dtype in ((most, torch.float32), (most + 1, torch.float32), (1, torch.float64)):
        binary_low_rank_linear(*arguments(24, 40, 16, lead=(tokens,), dtype=dtype))
    assert calls == [most]


def test_without_the_extension_and_without_generated_code_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpu, "available_paths", tuple)
    monkeypatch.setattr(compiled, "works", lambda dtype: False)
    args = arguments(24, 40, 16)
    assert torch.equal(binary_low_rank_linear(*args), reference.binary_low_rank_linear(*args))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The build as a new process sees it, with a cache of its own."""
    monkeypatch.delenv("NANOQUANT_NO_EXTENSION", raising=False)
    monkeypatch.setenv("NANOQUANT_CACHE", str(tmp_path / "cache"))
    for function in (cpu_build.library, cpu_build.available_paths, cpu_build._private_folder):
        function.cache_clear()
    yield tmp_path / "cache"
    for function in (cpu_build.library, cpu_build.available_paths, cpu_build._private_folder):
        function.cache_clear()


@needs_compiler
def test_it_is_compiled_once_and_found_again(fresh, monkeypatch):
    assert cpu_build.library() is not None
    (file,) = fresh.iterdir()
    cpu_build.library.cache_clear()
    monkeypatch.setattr(cpu_build, "_compile", None)
    assert cpu_build.library() is not None and list(fresh.iterdir()) == [file]


def test_no_compiler_is_said_once(fresh, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu_build.shutil, "which", lambda name: None)
    for _ in range(2):
        assert cpu_build.library() is None and cpu_build.available_paths() == ()
    assert caplog.text.count("there is no C++ compiler (c++, g++, clang++") == 1


def test_a_compiler_that_fails_is_named_and_leaves_nothing(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", f"{sys.executable} -c 1/0")
    assert cpu_build.library() is None
    assert "ZeroDivisionError" in caplog.text and list(fresh.iterdir()) == []


@needs_compiler
def test_a_damaged_file_in_the_cache_costs_speed_and_says_so(fresh, caplog):
    cpu_build._cached_file().write_bytes(b"not a library")
    assert cpu_build.library() is None and "without their C++ loop on the CPU" in caplog.text


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even root")
def test_a_read_only_cache_is_said_and_a_private_folder_serves(fresh, monkeypatch, caplog):
    monkeypatch.setenv("NANOQUANT_CACHE", "/proc/nanoquant")
    with caplog.at_level(logging.WARNING):
        assert cpu_build.library() is not None
    assert "/proc/nanoquant can't be written" in caplog.text


def test_a_switch_turns_it_off_and_importing_compiles_nothing(tmp_path):
    code = (
        "import nanoquant_kernels.cpu_build as b; assert not b.library.cache_info().currsize;"
        "assert b.library() is None and b.available_paths() == ()"
    )
    environment = os.environ | {
        "NANOQUANT_NO_EXTENSION": "1",
        "NANOQUANT_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert not (tmp_path / "cache").exists()
