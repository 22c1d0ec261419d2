"""Correlated inputs and gradients in the initializer: gathered once, tempered, solved for, and worth it."""

import dataclasses
import logging

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_llama

from nanoquant.admm import ADMMConfig, ADMMInitializer, ADMMState
from nanoquant.architectures import find_decoder
from nanoquant.budget import BudgetConfig
from nanoquant.calibration import collect_importances
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.importance import Importance, ImportanceConfig, stack
from nanoquant.model_config import ModelConfig
from nanoquant.quantize import quantize
from nanoquant.second_moment import Correlation, SecondMoment, SecondMomentMatrix, correlation_of

INPUTS, BOTH = (ImportanceConfig(curvature=curvature) for curvature in ("inputs", "both"))
SHORT = ADMMConfig(iterations=40)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(d, rank=4, seed=0):
    """A second moment (d, d) that is mostly of a low rank."""
    X = randn(d, rank, seed=seed) * 3
    return X @ X.T + torch.eye(d)


def metric_of(correlation):
    return (correlation.Q * correlation.spread) @ correlation.Q.mT


@pytest.mark.parametrize("sides", ["own", "other", "both"])
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_factor_update_solves_its_subproblem_with_metrics(sides, rho):
    solver = ADMMInitializer(SHORT)
    W, Z_other = randn(20, 14, dtype=torch.float64), randn(14, 6, seed=1, dtype=torch.float64)
    Z, dual = (randn(20, 6, seed=seed, dtype=torch.float64) for seed in (2, 3))
    own = correlation_of(correlated(20).double(), 0.2, 0.5, "x") if sides != "other" else None
    other = correlation_of(correlated(14).double(), 0.2, 0.5, "x") if sides != "own" else None
    L = torch.eye(20, dtype=torch.float64) if own is None else metric_of(own)
    R = torch.eye(14, dtype=torch.float64) if other is None else metric_of(other)
    U = solver.update_factor(L @ W @ R, Z_other, ADMMState(Z, Z, dual), rho, own, other)
    U.requires_grad_()
    X = Z_other / Z_other.norm(dim=0)
    ridge = SHORT.ridge * (X.mT @ R @ X).diagonal().mean()
    E = W - U @ X.mT
    loss = (L @ E @ R * E).sum() + rho * (U - Z + dual).square().sum() + ridge * U.square().sum()
    (0.5 * loss).backward()
    assert U.grad.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_an_identity_changes_nothing_but_rounding(shape):
    d_out, d_in = shape
    W, solver = randn(*shape, dtype=torch.float32), ADMMInitializer(ADMMConfig(iterations=5))
    i, o = randn(d_in, seed=1).exp(), randn(d_out, seed=2).exp()
    plain = Importance(input=i, output=o)
    identity = Correlation(torch.linalg.qr(randn(d_in, d_in, seed=3)).Q, torch.ones(d_in))
    a = solver(W, plain, 8)
    b = solver(W, dataclasses.replace(plain, input_correlation=identity), 8)
    torch.testing.assert_close(a.dense(), b.dense(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_errors_are_smaller_than_with_the_diagonal_where_the_correlation_is_known(shape, side):
    W, solver = randn(*shape), ADMMInitializer(SHORT)
    moments = [
        correlated(d) if which == side else torch.eye(d)
        for d, which in zip(shape, ("outputs", "inputs"), strict=True)
    ]
    o, i = (moment.diagonal() / moment.diagonal().mean() for moment in moments)
    plain = Importance(input=i, output=o)
    known = dataclasses.replace(
        plain,
        output_correlation=correlation_of(moments[0].clone(), 0.0, 1.0, "x"),
        input_correlation=correlation_of(moments[1].clone(), 0.0, 1.0, "x"),
    )

    def error(factors):
        E = W - factors.dense()
        return float((moments[0] @ E @ moments[1] * E).sum())

    assert error(solver(W, known, 24)) < 0.7 * error(solver(W, plain, 24))


def test_a_batch_has_a_correlation_for_each_member():
    W, solver = randn(3, 24, 16), ADMMInitializer(ADMMConfig(iterations=3))
    members = [
        Importance(
            input=torch.ones(16),
            output=torch.ones(24),
            input_correlation=correlation_of(correlated(16, seed=k), 0.2, 0.5, "x"),
            output_correlation=correlation_of(correlated(24, seed=k), 0.2, 0.5, "x"),
        )
        for k in range(3)
    ]
    together = solver(W, stack(members, W), 8).dense()
    assert together.shape == W.shape and together.isfinite().all()
    errors = (W - together).square().sum((1, 2)) / W.square().sum((1, 2))
    assert (errors < 0.9).all()


def test_tempering_keeps_the_trace_and_narrows_the_spectrum():
    moment = correlated(24)
    full, half, none = (correlation_of(moment.clone(), 0.0, p, "x") for p in (1.0, 0.5, 0.0))
    root = moment.diagonal().sqrt()
    torch.testing.assert_close(
        metric_of(full), moment / (root[:, None] * root), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(metric_of(none), torch.eye(24), rtol=0, atol=1e-5)
    for found in (full, half, none):
        assert float(found.spread.mean()) == pytest.approx(1, rel=1e-5)
    assert full.spread.max() > half.spread.max() > 1


def test_the_matrix_has_the_clipped_moments_on_its_diagonal():
    single, pairs = SecondMoment(0.9), SecondMomentMatrix(0.9)
    for seed in range(3):
        z = randn(40, 6, seed=seed) * (1 + seed)
        single.update(z)
        pairs.update(z)
    torch.testing.assert_close(pairs.value(), single.value(), rtol=1e-5, atol=0)
    assert torch.equal(pairs.matrix(), pairs.matrix().T)
    before = pairs.value().clone()
    pairs.release()
    pairs.release()
    assert torch.equal(pairs.value(), before) and pairs._sum.numel() == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_read_one_tensor_share_its_correlation_and_keep_their_diagonal(family):
    model = FAMILIES[family]()
    decoder, windows = find_decoder(model), random_windows(6, 16)
    plain = collect_importances(model, decoder, windows, ImportanceConfig(), batch_size=2)
    found = collect_importances(model, decoder, windows, BOTH, batch_size=2)
    alone = collect_importances(model, decoder, windows, INPUTS, batch_size=2)
    for name in decoder.linear_modules():
        torch.testing.assert_close(found[name].input, plain[name].input, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].output, plain[name].output, rtol=1e-4, atol=1e-5)
        assert plain[name].input_correlation is None
        assert found[name].input_correlation.Q.shape[0] == len(plain[name].input)
        assert found[name].output_correlation.Q.shape[0] == len(plain[name].output)
        assert torch.equal(found[name].input_correlation.Q, alone[name].input_correlation.Q)
        assert alone[name].output_correlation is None
    for b, groups in enumerate(decoder.groups):
        for group in groups:
            first, *others = (found[decoder.full_name(b, name)].input_correlation for name in group)
            assert all(other is first for other in others)


@pytest.mark.parametrize(("side", "what"), [(0, "inputs"), (1, "output gradients")])
def test_a_correlation_that_is_not_finite_falls_back_to_the_diagonal_and_names_the_layer(
    caplog, side, what
):
    model, windows = tiny_llama(), random_windows(6, 16)
    decoder = find_decoder(model)
    decoder = dataclasses.replace(decoder, linears=((), ("mlp.down_proj",)))
    name = "model.layers.1.mlp.down_proj"
    eigh = torch.linalg.eigh

    def failing(R):
        failing.calls += 1
        if failing.calls in (side + 1, side + 2):  # in float32, and again in float64
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(R)

    failing.calls = 0
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch.linalg, "eigh", failing)
        found = collect_importances(model, decoder, windows, BOTH)[name]
    correlations = (found.input_correlation, found.output_correlation)
    assert correlations[side] is None and correlations[1 - side] is not None
    assert (found.input > 0).all() and (found.output > 0).all()
    assert f"{what} of {name} is not finite" in caplog.text
    W, factors = (
        model.get_submodule(name).weight.detach(),
        ADMMInitializer(ADMMConfig(iterations=3)),
    )
    assert factors(W, found, 8).dense().isfinite().all()


@pytest.mark.parametrize("allocation", ["uniform", "measured"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_with_correlations(family, allocation):
    config = nanoquant_config(
        budget=BudgetConfig(bits=1.2, rank_multiple=8, allocation=allocation),
        calibration=CalibrationConfig(windows=4, length=16),
        importance=BOTH,
        admm=ADMMConfig(iterations=3),
        model=ModelConfig(train="none"),
    )
    tokens = random_windows(8, 16).flatten()
    configs = [
        dataclasses.replace(config, importance=x) for x in (BOTH, INPUTS, ImportanceConfig())
    ]
    models = [FAMILIES[family]() for _ in configs]
    reports = [quantize(m, tokens, c) for m, c in zip(models, configs, strict=True)]
    errors = [r.blocks[0].weight_error for r in reports]
    assert errors[0] != errors[1] and errors[1] != errors[2] and errors[0] != errors[2]
    assert all(p.isfinite().all() for p in models[0].parameters() if p.is_floating_point())


def test_settings_of_the_curvature_are_checked():
    with pytest.raises(ValueError, match="curvature must be diagonal, inputs or both, got 'dense'"):
        ImportanceConfig(curvature="dense")
    with pytest.raises(ValueError, match="temper is 2"):
        ImportanceConfig(curvature="inputs", temper=2)
    with pytest.raises(
        ValueError, match="importance.temper=1.0 and importance.curvature=diagonal exclude"
    ):
        ImportanceConfig(temper=1.0)
