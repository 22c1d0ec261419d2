"""LB-ADMM: every update solves its own equation, and the result is worth the work."""

import dataclasses

import pytest
import torch

from nanoquant.admm import ADMMConfig, ADMMInitializer, ADMMState, refit_scales, unit_columns
from nanoquant.binary import BinaryFactors, relative_error, sign
from nanoquant.importance import Importance

SHORT = ADMMConfig(iterations=30)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_importance(d_out, d_in, seed=0, batch=()):
    i, o = randn(*batch, d_in, seed=seed).exp(), randn(*batch, d_out, seed=seed + 1).exp()
    return Importance(input=i / i.mean(-1, keepdim=True), output=o / o.mean(-1, keepdim=True))


def uniform_importance(d_out, d_in):
    return Importance(input=torch.ones(d_in), output=torch.ones(d_out))


def weighted_error(W, factors, importance):
    weight = importance.output.unsqueeze(-1) * importance.input.unsqueeze(-2)
    return float(relative_error(W, factors.dense(), weight))


def sign_of_svd(W, rank, importance):
    """Signs of the leading singular vectors of the preconditioned weight, with fitted scales."""
    S = torch.linalg.svd(importance.output.sqrt().unsqueeze(-1) * W * importance.input.sqrt())
    ones = torch.ones(W.shape[0]), torch.ones(W.shape[1])
    factors = BinaryFactors(S.U[:, :rank], S.Vh[:rank].mT, *ones)
    for _ in range(5):
        factors = refit_scales(factors, W, importance.input, importance.output)
    return factors


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_factor_update_solves_its_subproblem(rho):
    solver = ADMMInitializer(SHORT)
    W, Z_other = randn(20, 14, dtype=torch.float64), randn(14, 6, seed=1, dtype=torch.float64)
    Z, L = (randn(20, 6, seed=seed, dtype=torch.float64) for seed in (2, 3))
    U = solver.update_factor(W, Z_other, ADMMState(Z, Z, L), rho).requires_grad_()
    X = Z_other / Z_other.norm(dim=0)
    lagrangian = (W - U @ X.mT).square().sum() + rho * (U - Z + L).square().sum()
    (0.5 * (lagrangian + SHORT.ridge * U.square().sum())).backward()
    assert U.grad.abs().max() < 1e-8


def test_factor_update_agrees_when_cholesky_fails():
    W, Z = randn(6, 5, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    solver = ADMMInitializer(ADMMConfig(ridge=1e-18))  # X^T X of equal columns is singular
    state = ADMMState(*(torch.zeros(6, 3, dtype=torch.float64) for _ in range(3)))
    shaped = solver.update_factor(W, Z, state, 0.5)
    X, _ = unit_columns(Z)
    A = X.mT @ X + 0.5 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(shaped, torch.linalg.solve(A, X.mT @ W.mT).mT)


def test_proxy_update_is_the_nearest_matrix_of_its_signs_with_rank_one_magnitudes():
    solver = ADMMInitializer(ADMMConfig(power_iterations=200))
    P, L = randn(20, 6, dtype=torch.float64), randn(20, 6, seed=1, dtype=torch.float64)
    Z = solver.update_proxy(P, ADMMState(P, P, L)).Z
    S = torch.linalg.svd((P + L).abs())
    best = S.S[0] * S.U[:, :1] @ S.Vh[:1]
    torch.testing.assert_close(Z.abs(), best.abs(), rtol=0, atol=1e-8)
    assert torch.equal(sign(Z), sign(P + L))


def test_dual_update_adds_the_disagreement():
    P, Z, L = (randn(20, 6, seed=seed, dtype=torch.float64) for seed in range(3))
    new = ADMMInitializer(SHORT).update_proxy(P, ADMMState(Z, Z, L))
    torch.testing.assert_close(new.L, L + P - new.Z, rtol=0, atol=1e-12)
    assert torch.equal(new.P, P)


def test_start_is_gaussian_with_its_disagreement_as_dual():
    solver, like = ADMMInitializer(SHORT), torch.zeros((), dtype=torch.float32)
    state = solver.start((400,), 100, torch.Generator().manual_seed(0), like)
    assert abs(float(state.P.mean())) < 0.02 and abs(float(state.P.std()) - 1) < 0.02
    assert torch.equal(state.L, state.P - state.Z)


def test_read_off_keeps_the_signs_of_the_proxies_and_gives_scales_that_are_not_negative():
    solver = ADMMInitializer(SHORT)
    left, right = solver.solve(randn(40, 30), 8, torch.Generator().manual_seed(0))
    f = solver.read_off(left, right, torch.ones(40), torch.ones(30))
    assert torch.equal(sign(f.U), sign(left.Z)) and torch.equal(sign(f.V), sign(right.Z))
    assert (f.s1 >= 0).all() and (f.s2 >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_planted_factors_are_found_from_one_of_four_starts(seed):
    planted = BinaryFactors(
        randn(64, 8, seed=seed),
        randn(48, 8, seed=seed + 10),
        randn(64, seed=seed + 20).abs() + 0.5,
        randn(48, seed=seed + 30).abs() + 0.5,
    )
    W, solver = planted.dense(), ADMMInitializer(ADMMConfig())
    starts = (torch.Generator().manual_seed(start) for start in range(4))
    importance = uniform_importance(64, 48)
    assert min(weighted_error(W, solver(W, importance, 8, s), importance) for s in starts) < 1e-6


@pytest.mark.parametrize("shape", [(80, 60), (60, 80)], ids=["tall", "wide"])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_below_the_signs_of_singular_vectors(seed, shape):
    W, importance = randn(*shape, seed=seed), random_importance(*shape, seed=seed + 5)
    found = ADMMInitializer(ADMMConfig(iterations=100))(W, importance, 32)
    baseline = weighted_error(W, sign_of_svd(W, 32, importance), importance)
    assert weighted_error(W, found, importance) < 0.9 * baseline


def gaussian_error(rank):
    W, importance = randn(1024, 512), uniform_importance(1024, 512)
    return weighted_error(W, ADMMInitializer(ADMMConfig())(W, importance, rank), importance)


def test_gaussian_matrix_reaches_the_reference_error_at_rank_160():
    assert gaussian_error(160) <= 0.600


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "limit"), [(256, 0.437), (320, 0.352)])
def test_gaussian_matrix_reaches_the_reference_error_at_higher_ranks(rank, limit):
    assert gaussian_error(rank) <= limit


def test_error_falls_with_rank_to_twice_the_smaller_dimension_and_stays_finite():
    W, importance = randn(96, 48), random_importance(96, 48)
    solver = ADMMInitializer(ADMMConfig(iterations=30))
    errors = [weighted_error(W, solver(W, importance, r), importance) for r in (24, 48, 72, 96)]
    assert all(b < 0.75 * a for a, b in zip(errors[:-1], errors[1:], strict=True))


def test_importances_lower_the_error_where_they_are_high():
    W, importance = randn(48, 40), random_importance(48, 40)
    solver = ADMMInitializer(SHORT)
    aware, blind = solver(W, importance, 16), solver(W, uniform_importance(48, 40), 16)
    assert weighted_error(W, aware, importance) < weighted_error(W, blind, importance)


def test_result_depends_on_the_generator_and_on_nothing_else_random():
    W, importance, solver = randn(40, 30), random_importance(40, 30), ADMMInitializer(SHORT)

    def run(seed):
        torch.randn(7)  # the global state must not matter
        return solver(W, importance, 8, torch.Generator().manual_seed(seed))

    a, b, c = run(1), run(1), run(2)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("U", "V", "s1", "s2"))
    assert not torch.equal(sign(a.U), sign(c.U))


def test_a_batch_is_solved_as_its_members_are_alone(monkeypatch):
    def same_start(self, shape, rank, generator, like):
        P = randn(shape[-1], rank, seed=shape[-1]).expand(*shape, rank)
        return ADMMState(P, P.sign(), P - P.sign())

    monkeypatch.setattr(ADMMInitializer, "start", same_start)
    W, importance = randn(3, 40, 30), random_importance(40, 30, batch=(3,))
    solver = ADMMInitializer(SHORT)
    together = solver(W, importance, 8).dense()
    for k in range(3):
        alone = Importance(input=importance.input[k], output=importance.output[k])
        torch.testing.assert_close(together[k], solver(W[k], alone, 8).dense(), rtol=0, atol=1e-3)


def test_a_wide_matrix_is_solved_as_its_transpose():
    solver = ADMMInitializer(ADMMConfig(iterations=30, refit_sweeps=0))
    W, importance = randn(40, 30), random_importance(40, 30)
    tall = solver(W, importance, 8)
    wide = solver(W.mT, Importance(input=importance.output, output=importance.input), 8)
    assert torch.equal(sign(tall.U), sign(wide.V)) and torch.equal(sign(tall.V), sign(wide.U))
    torch.testing.assert_close(tall.dense(), wide.dense().mT)


def test_result_scales_with_the_weight():
    solver, importance = ADMMInitializer(SHORT), random_importance(40, 30)
    W = randn(40, 30)
    small = solver(W * 2.0**-20, importance, 8)
    torch.testing.assert_close(small.dense() * 2.0**20, solver(W, importance, 8).dense())


def test_refit_never_increases_the_weighted_error():
    for seed in range(3):
        W, importance = randn(40, 30, seed=seed), random_importance(40, 30, seed=seed)
        factors = ADMMInitializer(ADMMConfig(iterations=20, refit_sweeps=0))(W, importance, 8)
        errors = [weighted_error(W, factors, importance)]
        for _ in range(4):
            factors = refit_scales(factors, W, importance.input, importance.output)
            errors.append(weighted_error(W, factors, importance))
        assert all(b <= a + 1e-6 for a, b in zip(errors, errors[1:], strict=False))
        assert errors[1] < errors[0]


def test_refit_keeps_the_scale_of_a_row_that_the_signs_cancel():
    factors = BinaryFactors(
        torch.ones(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1), torch.ones(1)
    )
    refitted = refit_scales(factors, torch.ones(1, 1), torch.ones(1), torch.ones(1))
    assert float(refitted.s1) == float(refitted.s2) == 1


CHANGED = {"iterations": 21, "ridge": 0.3, "power_iterations": 1, "refit_sweeps": 0}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ADMMConfig)])
def test_every_setting_changes_the_result(field):
    W, importance = randn(40, 30), random_importance(40, 30)
    config = ADMMConfig(iterations=20)
    changed = dataclasses.replace(config, **{field: CHANGED[field]})
    a, b = (ADMMInitializer(c)(W, importance, 8).dense() for c in (config, changed))
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "changes", [{"iterations": 0}, {"power_iterations": 0}, {"refit_sweeps": -1}, {"ridge": 0.0}]
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ADMMConfig(**changes)


def test_bfloat16_weights_give_float32_factors():
    factors = ADMMInitializer(SHORT)(randn(40, 30).bfloat16(), random_importance(40, 30), 8)
    assert factors.U.dtype == factors.s1.dtype == torch.float32


def test_unfit_inputs_are_refused():
    solver, W = ADMMInitializer(SHORT), randn(40, 30)
    good = random_importance(40, 30)
    with pytest.raises(ValueError, match="do not fit a weight"):
        solver(W, random_importance(30, 40), 8)
    for rank in (0, 61):
        with pytest.raises(ValueError, match=r"rank must lie in 1\.\.60"):
            solver(W, good, rank)
    with pytest.raises(ValueError, match="non-finite"):
        solver(W.index_fill(0, torch.tensor([3]), float("nan")), good, 8)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        moment = good.input.index_fill(0, torch.tensor([3]), bad)
        with pytest.raises(ValueError, match="input importances"):
            solver(W, Importance(input=moment, output=good.output), 8)
