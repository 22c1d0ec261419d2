"""8-bit activations: every instruction path gives what the plain PyTorch twin gives, exact in the integers."""

import os
import subprocess
import sys

import needs
import pytest
import torch
from test_kernels_cpu import ROUNDING, SHAPES
from test_kernels_ops import arguments, expected, with_one_and_two_threads

from nanoquant_kernels import binary_low_rank_linear_int8, cpu_build, cpu_int8, int8_reference
from nanoquant_kernels.int8_reference import groups_of, quantize, rounded
from nanoquant_kernels.layout import unpack_signs

ERROR = 0.01  # of standard normal inputs, at any of these widths
PATHS = cpu_build.available_int8_paths()
WIDE = [*SHAPES, (300, 9000, 1200), (40, 256, 511), (5, 257, 33)]  # d_out, d_in, rank
needs_compiler = pytest.mark.skipif(not PATHS, reason="no C++ compiler")
every_path = pytest.mark.parametrize("path", PATHS)


def integers(d_out, d_in, rank, tokens=3):
    """Arguments whose x and s2 are their own 8-bit rounding, with 127 as the largest of each group."""
    args = list(arguments(d_out, d_in, rank, lead=(tokens,)))
    g = torch.Generator().manual_seed(1)
    args[0] = torch.randint(-127, 128, (tokens, d_in), generator=g).float()
    group = groups_of(d_in).tolist()
    args[0][:, [group.index(i) for i in set(group)]] = 127
    args[3], args[4], args[5] = torch.ones(d_out), torch.full((d_in,), 0.25), None
    return args


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_the_reference_stays_near_the_dense_product(shape):
    args = arguments(*shape, dtype=torch.float64)
    y, truth = int8_reference.binary_low_rank_linear_int8(*args), expected(*args)
    assert y.dtype == torch.float64
    assert ((y - truth).norm(dim=-1) <= ERROR * truth.norm(dim=-1)).all()


def test_more_scales_mean_less_error_than_one_a_token():
    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert (rounded(x) - x).norm() < 0.7 * ((x / scale).round() * scale - x).norm()


def test_rounding_is_within_half_a_step_and_uses_all_of_8_bits():
    x = torch.randn(4, 700, generator=torch.Generator().manual_seed(0))
    q, scale = quantize(x)
    assert q.dtype == torch.int8 and scale.shape == (4, int8_reference.GROUPS)
    assert q.abs().max() == 127
    assert ((rounded(x) - x).abs() <= 0.5001 * scale[:, groups_of(700)]).all()


@needs_compiler
@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_every_path_gives_the_reference(shape, dtype, path):
    for bias in (True, False):
        args = arguments(*shape, lead=(9,), dtype=dtype, bias=bias)
        y = cpu_int8.binary_low_rank_linear_int8(*args, path=path)
        wanted = int8_reference.binary_low_rank_linear_int8(*args)
        assert y.dtype == dtype and y.shape == wanted.shape
        wanted = wanted.double()
        error = (y.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)  # of each token
        assert error.median() <= ROUNDING[dtype]
        assert (
            error.max() <= 5e-3 + ROUNDING[dtype]
        )  # a latent at half a step may round the other way


@needs_compiler
@every_path
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_sums_of_integers_are_exact(shape, path):
    d_out, d_in, rank = shape
    args = integers(d_out, d_in, rank)
    z = args[0].double() * 0.25 @ unpack_signs(args[2], d_in, torch.float64).mT
    assert (z.abs() * 4 < 2**24).all()  # exact in float32
    truth = rounded(z.float()).double() @ unpack_signs(args[1], rank, torch.float64).mT
    y = cpu_int8.binary_low_rank_linear_int8(*args, path=path)
    assert (y - truth).norm() <= 1e-6 * truth.norm()


@needs_compiler
@every_path
def test_the_largest_sums_do_not_overflow(path):
    d_in = 256 * 600
    x, ones = torch.full((1, d_in), 3.0), torch.ones(d_in)
    for byte in (0, 255):  # all +1, all -1
        v, u = torch.full((1, d_in // 8), byte, dtype=torch.uint8), torch.zeros(2, 1).byte()
        y = cpu_int8.binary_low_rank_linear_int8(x, u, v, torch.ones(2), ones, None, 1, path=path)
        wanted = 3.0 * d_in * (1 if byte == 0 else -1)
        torch.testing.assert_close(y, torch.full((1, 2), wanted), rtol=1e-5, atol=0)


@needs_compiler
@every_path
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_own_token_nan(value, path):
    args = list(arguments(48, 700, 40, lead=(3,)))
    args[0][1, 5] = value
    for y in (
        cpu_int8.binary_low_rank_linear_int8(*args, path=path),
        int8_reference.binary_low_rank_linear_int8(*args),
    ):
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@needs_compiler
@every_path
def test_zeros_and_what_is_next_to_nothing_give_the_bias(path):
    args = list(arguments(48, 70, 40, lead=(3,)))
    args[0][0], args[0][1], args[0][2] = 0, 1e-40, -1e-38
    y = cpu_int8.binary_low_rank_linear_int8(*args, path=path)
    assert torch.equal(y, args[5].expand(3, -1))
    assert torch.equal(y, int8_reference.binary_low_rank_linear_int8(*args))


@needs_compiler
@every_path
def test_every_output_is_written(path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, shape: x.new_full(shape, float("nan")))
    for shape in WIDE[:5]:
        args = arguments(*shape, lead=(7,))
        assert cpu_int8.binary_low_rank_linear_int8(*args, path=path).isfinite().all()


@needs_compiler
def test_threads_do_not_change_a_bit():
    assert torch.equal(*with_one_and_two_threads(cpu_int8.binary_low_rank_linear_int8))


READ_NO_FURTHER = """
import ctypes, mmap, torch
from nanoquant_kernels import cpu_build, cpu_int8
SIZE = mmap.PAGESIZE * 64

def at_the_end(rows, width):
    memory = mmap.mmap(-1, SIZE + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, SIZE))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=torch.uint8)[SIZE - rows * width : SIZE].view(rows, width)

for d_out, d_in, rank in ((3, 40, 3), (64, 40, 64), (32, 8, 96), (33, 700, 65), (96, 256, 256)):
    u, v = at_the_end(d_out, -(-rank // 8)), at_the_end(rank, -(-d_in // 8))
    s1, s2 = torch.ones(d_out), torch.ones(d_in)
    for path in cpu_build.available_int8_paths():
        cpu_int8.binary_low_rank_linear_int8(torch.ones(2, d_in), u, v, s1, s2, None, rank, path=path)
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="protects a page as Linux does")
def test_signs_are_read_to_the_end_of_their_memory_and_no_further():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", READ_NO_FURTHER], check=True, env=environment)


def test_the_default_dtype_does_not_change_the_reference():
    args = arguments(24, 40, 16)
    wanted = int8_reference.binary_low_rank_linear_int8(*args)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(int8_reference.binary_low_rank_linear_int8(*args), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_dimensions_and_views_work(lead):
    x, *rest = arguments(24, 40, 16, lead=lead)
    y = binary_low_rank_linear_int8(x, *rest)
    assert y.shape == (*lead, 24)
    wide = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(binary_low_rank_linear_int8(wide, *rest), y)


def test_without_the_extension_the_reference_serves(monkeypatch):
    monkeypatch.setattr(cpu_int8, "available_int8_paths", tuple)
    args = arguments(24, 40, 16)
    wanted = int8_reference.binary_low_rank_linear_int8(*args)
    assert torch.equal(binary_low_rank_linear_int8(*args), wanted)


def test_dtypes_that_the_loop_does_not_know_go_to_the_reference():
    args = arguments(24, 40, 16, dtype=torch.float64)
    wanted = int8_reference.binary_low_rank_linear_int8(*args)
    assert torch.equal(binary_low_rank_linear_int8(*args), wanted)


def test_bad_arguments_are_named():
    x, u, v, s1, s2, bias, rank = arguments(24, 40, 16)
    for args, words in (
        ((x[..., :39], u, v, s1, s2, bias, rank), "x has shape"),
        ((x, u.int(), v, s1, s2, bias, rank), "u_signs must be uint8"),
        ((x.int(), u, v, s1, s2, bias, rank), "x must be floating point"),
        ((x, u, v, s1, s2.to("meta"), bias, rank), "s2 is on meta"),
        ((x, u, v, s1, s2, bias[:3], rank), "bias has shape"),
    ):
        with pytest.raises(ValueError, match=words):
            binary_low_rank_linear_int8(*args)


def test_gradients_are_refused_and_inference_goes_on():
    x, *rest = arguments(24, 40, 16)
    x.requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        binary_low_rank_linear_int8(x, *rest)
    with torch.no_grad():
        assert binary_low_rank_linear_int8(x, *rest).isfinite().all()


def test_autocast_decides_the_dtype_of_the_result():
    args = arguments(24, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert binary_low_rank_linear_int8(*args).dtype == torch.bfloat16


def test_the_fake_kernel_agrees_with_the_real_one():
    args = arguments(24, 40, 16, dtype=torch.bfloat16)
    operator = torch.ops.nanoquant.binary_low_rank_linear_int8.default
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    y = binary_low_rank_linear_int8(*meta)
    assert y.is_meta and y.shape == (3, 24) and y.dtype == torch.bfloat16


@needs.compiler
def test_torch_compile_keeps_it_in_one_graph():
    args = arguments(24, 40, 16)
    compiled = torch.compile(binary_low_rank_linear_int8, fullgraph=True)
    assert torch.equal(compiled(*args), binary_low_rank_linear_int8(*args))
