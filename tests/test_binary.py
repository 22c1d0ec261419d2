"""Signs, the straight-through gradient, the rank-one step and factors do what their equations say."""

import pytest
import torch

from nanoquant.binary import (
    BinaryFactors,
    rank_one,
    relative_error,
    sign,
    straight_through_sign,
    svid,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def random_factors(d_out=12, d_in=10, rank=4, batch=()):
    generator = torch.manual_seed(0)
    U, V, s1, s2 = (
        torch.randn(*batch, *shape, generator=generator)
        for shape in ((d_out, rank), (d_in, rank), (d_out,), (d_in,))
    )
    return BinaryFactors(U, V, s1, s2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_of_both_zeros_is_plus_one(dtype):
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30], dtype=dtype)
    assert sign(x).tolist() == [-1, 1, 1, 1]
    assert sign(x).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_straight_through_is_sign_forward_and_identity_backward_at_any_magnitude(dtype):
    x = torch.tensor([-1e5, -1e-7, -0.0, 0.0, 3.0, 2e4], requires_grad=True)
    gradient = torch.arange(6.0).to(dtype)
    y = straight_through_sign(x, dtype)
    assert y.dtype == dtype and torch.equal(y, sign(x).to(dtype))
    y.backward(gradient)
    assert torch.equal(x.grad, gradient.float())


def test_rank_one_is_the_leading_singular_pair_of_a_non_negative_matrix():
    P = torch.rand(3, 14, 9, generator=torch.manual_seed(0), dtype=torch.float64)
    a, b = rank_one(P, 100)
    S = torch.linalg.svd(P)
    best = S.S[:, 0, None, None] * S.U[..., :1] @ S.Vh[..., :1, :]
    torch.testing.assert_close(a.unsqueeze(-1) * b.unsqueeze(-2), best, rtol=0, atol=1e-10)
    assert (a >= 0).all() and (b >= 0).all()


def test_svid_is_the_sign_times_the_best_rank_one_of_the_magnitudes():
    P = torch.randn(14, 9, generator=torch.manual_seed(0), dtype=torch.float64)
    S = torch.linalg.svd(P.abs())
    magnitude = (S.S[0] * S.U[:, :1] @ S.Vh[:1]).abs()
    torch.testing.assert_close(svid(P, 100), P.sign() * magnitude, rtol=0, atol=1e-10)


def test_rank_one_of_zeros_is_zero_and_finite():
    a, b = rank_one(torch.zeros(4, 3), 5)
    assert torch.equal(a.unsqueeze(-1) * b, torch.zeros(4, 3))


def test_dense_is_scales_times_signs_entry_by_entry():
    f = random_factors(3, 2, 5)
    dense = f.dense()
    for i in range(3):
        for j in range(2):
            expected = f.s1[i] * f.s2[j] * (sign(f.U[i]) * sign(f.V[j])).sum()
            assert dense[i, j] == pytest.approx(float(expected), rel=1e-6)
    assert f.rank == 5


def test_normalized_factors_have_mean_magnitude_one_and_the_same_weight():
    f = random_factors(batch=(2,))
    n = f.normalized()
    for x in (n.U, n.V):
        torch.testing.assert_close(x.abs().mean((-2, -1)), torch.ones(2))
    assert torch.equal(n.dense(), f.dense())


def test_unbind_splits_a_batch_in_order():
    f = random_factors(batch=(3,))
    parts = f.unbind()
    assert len(parts) == 3
    assert all(
        torch.equal(part.dense(), whole) for part, whole in zip(parts, f.dense(), strict=True)
    )


def test_relative_error_is_weighted_and_one_for_the_zero_matrix():
    W = torch.tensor([[1.0, 2.0]])
    assert relative_error(W, torch.zeros(1, 2)) == 1
    assert relative_error(W, torch.tensor([[1.0, 0.0]]), torch.tensor([[8.0, 0.0]])) == 0
    assert relative_error(W, torch.tensor([[0.0, 2.0]])) == pytest.approx(0.2)
