import needs
import pytest
import torch
from torch.nn import functional as F

from nanoquant_kernels import binary_low_rank_linear, pack_signs, reference, unpack_signs

RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # a few roundings each
CASES = [(24, 40, 16), (17, 23, 5), (8, 8, 8), (1, 9, 1), (8, 12, 19)]  # d_out, d_in, rank


def arguments(d_out, d_in, rank, lead=(3,), dtype=torch.float32, bias=True, scale_dtype=None):
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g)
    x, b = torch.randn(*lead, d_in, generator=g), torch.randn(d_out, generator=g)
    s1, s2 = torch.rand(d_out, generator=g) + 0.5, torch.rand(d_in, generator=g) + 0.5
    real = [t.to(scale_dtype or dtype) for t in (s1, s2)]
    return x.to(dtype), pack_signs(u), pack_signs(v), *real, b.to(dtype) if bias else None, rank


def with_one_and_two_threads(function):
    """Results of work that is large enough for two threads."""
    args, before = arguments(2048, 2048, 1024, lead=(2,)), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            yield function(*args)
    finally:
        torch.set_num_threads(before)


def dense_weight(u_signs, v_signs, s1, s2, rank, dtype=torch.float64):
    U, V = unpack_signs(u_signs, rank, dtype), unpack_signs(v_signs, len(s2), dtype)
    return s1.to(dtype)[:, None] * (U @ V) * s2.to(dtype)


def expected(x, u_signs, v_signs, s1, s2, bias, rank):
    W = dense_weight(u_signs, v_signs, s1, s2, rank)
    return F.linear(x.double(), W, None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_is_the_dense_product(case, bias, dtype):
    args = arguments(*case, dtype=dtype, bias=bias)
    y, truth = binary_low_rank_linear(*args), expected(*args)
    assert y.dtype == dtype
    assert (y.double() - truth).norm() <= RELATIVE[dtype] * truth.norm()


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_leading_dimensions_work(lead):
    args = arguments(24, 40, 16, lead=lead)
    y = binary_low_rank_linear(*args)
    assert y.shape == (*lead, 24)
    torch.testing.assert_close(y.double(), expected(*args), rtol=1e-5, atol=1e-5)


def test_scales_of_another_dtype_are_cast_to_that_of_the_input():
    args = arguments(24, 40, 16, scale_dtype=torch.bfloat16)
    y = binary_low_rank_linear(*args)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected(*args), rtol=1e-5, atol=1e-5)


def test_result_is_the_same_bits_every_time():
    args = arguments(64, 96, 32, lead=(50,), dtype=torch.bfloat16)
    assert torch.equal(binary_low_rank_linear(*args), binary_low_rank_linear(*args))


def test_meta_tensors_give_shape_and_dtype():
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments(17, 23, 5)]
    y = binary_low_rank_linear(*args)
    assert y.is_meta and y.shape == (3, 17) and y.dtype == torch.float32


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_operator_passes_opcheck(bias):
    x, u, v, s1, s2, b, rank = arguments(17, 23, 5, bias=bias)
    real = [None if t is None else t.requires_grad_() for t in (x, s1, s2, b)]
    operator = torch.ops.nanoquant.binary_low_rank_linear.default
    result = torch.library.opcheck(operator, (real[0], u, v, *real[1:], rank))
    assert set(result.values()) == {"SUCCESS"}


def test_gradients_of_input_scales_and_bias_match_finite_differences():
    x, u, v, s1, s2, b, rank = arguments(6, 11, 5, lead=(2, 3), dtype=torch.float64)

    def apply(x, s1, s2, b):
        return binary_low_rank_linear(x, u, v, s1, s2, b, rank)

    assert torch.autograd.gradcheck(apply, [t.requires_grad_() for t in (x, s1, s2, b)])


def test_gradients_have_the_dtype_of_their_tensors():
    x, u, v, s1, s2, b, rank = arguments(24, 40, 16, dtype=torch.bfloat16)
    x, s1, s2, b = (t.detach().requires_grad_() for t in (x, s1.float(), s2.float(), b))
    binary_low_rank_linear(x, u, v, s1, s2, b, rank).sum().backward()
    assert [t.grad.dtype for t in (x, s1, s2, b)] == [t.dtype for t in (x, s1, s2, b)]


def test_only_wanted_gradients_are_computed():
    x, u, v, s1, s2, b, rank = arguments(24, 40, 16)
    none = reference.binary_low_rank_linear_backward(
        torch.ones(3, 24), x, u, v, s1, s2, rank, (False, True, False)
    )
    assert none[0] is None and none[1].shape == (24,) and none[2] is None


def test_autocast_chooses_the_dtype_as_for_a_linear():
    args = arguments(24, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = binary_low_rank_linear(*args)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, binary_low_rank_linear(args[0].bfloat16(), *args[1:]))


@needs.compiler
def test_compiled_forward_and_backward_are_one_graph_with_equal_results():
    args = arguments(24, 40, 16)
    results = []
    for function in (binary_low_rank_linear, torch.compile(binary_low_rank_linear, fullgraph=True)):
        x = args[0].clone().requires_grad_()
        y = function(x, *args[1:])
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1])


WRONG = {
    "x": (0, torch.zeros(3, 41)),
    "u_signs": (1, torch.zeros(24, 3, dtype=torch.uint8)),
    "v_signs": (2, torch.zeros(15, 5, dtype=torch.uint8)),
    "u_signs must be uint8": (1, torch.zeros(24, 2)),
    "s1": (3, torch.zeros(24, 1)),
    "s2 must be floating": (4, torch.zeros(40, dtype=torch.int64)),
    "bias": (5, torch.zeros(23)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message):
    args = list(arguments(24, 40, 16))
    index, value = WRONG[message]
    args[index] = value
    with pytest.raises(ValueError, match=message):
        binary_low_rank_linear(*args)


def test_tensors_on_another_device_are_named():
    x, u, *rest = arguments(24, 40, 16)
    with pytest.raises(ValueError, match="u_signs is on meta, but x on cpu; move one to the other"):
        binary_low_rank_linear(x, u.to("meta"), *rest)


def test_a_matrix_without_rank_is_refused():
    x, u, v, s1, s2, bias, _ = arguments(24, 40, 16)
    with pytest.raises(ValueError, match="must be at least 1, got 24, 40, 0"):
        binary_low_rank_linear(x, u[:, :0], v[:0], s1, s2, bias, 0)
