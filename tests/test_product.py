"""Product quantization of a weight: what factors mean, what the initializer minimises and reaches, what it refuses."""

import pytest
import torch

from nanoquant.binary import relative_error
from nanoquant.codebooks import ProductFactors
from nanoquant.importance import Importance, stack
from nanoquant.kmeans import LloydConfig
from nanoquant.product import KMeansConfig, KMeansInitializer
from nanoquant.product_budget import ProductShape, product_bits

QUICK = KMeansConfig(lloyd=LloydConfig(iterations=5, sample=64), rounds=2)


def gaussian(d_out=64, d_in=96, seed=0):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def importance_of(d_out=64, d_in=96, seed=1):
    g = torch.Generator().manual_seed(seed)
    return Importance(torch.rand(d_in, generator=g) + 0.1, torch.rand(d_out, generator=g) + 0.1)


def even(d_out, d_in):
    return Importance(torch.ones(d_in), torch.ones(d_out))


def error_of(factors, W, importance):
    weight = importance.output.unsqueeze(-1) * importance.input
    return float(relative_error(W, factors.dense(), weight))


def quantize(W, shape, importance=None, config=QUICK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    importance = importance or even(*W.shape[-2:])
    return KMeansInitializer(config)(W, importance, shape, generator)


def test_factors_are_what_the_formula_says_entry_by_entry():
    shape = ProductShape(5, (4, 6), 4)  # 5 does not divide 32: the last group is cut
    f = quantize(gaussian(128, 32), shape)
    dense = f.dense()
    assert dense.shape == (128, 32) and f.shape == shape and f.indices[0].shape == (128, 7)
    for i, j in ((0, 0), (31, 31), (32, 4), (127, 30)):
        entry = sum(
            C[i // 32, int(k[i, j // 5]), j % 5]
            for C, k in zip(f.codebooks, f.indices, strict=True)
        )
        torch.testing.assert_close(dense[i, j], f.scale[i] * entry)
    assert f.bits == product_bits(128, 32, shape)


@pytest.mark.slow
def test_gaussian_weights_at_one_bit_keep_two_thirds_of_their_energy():
    W, shape = gaussian(1024, 1024), ProductShape(8, (8,))
    assert error_of(quantize(W, shape, config=KMeansConfig()), W, even(1024, 1024)) <= 0.33


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (ProductShape(4, (4,)), 0.36),
        (ProductShape(8, (4, 4)), 0.37),
        (ProductShape(4, (4, 4)), 0.125),
        (ProductShape(4, (6, 6)), 0.065),
        (ProductShape(2, (8,)), 0.011),
    ],
    ids=str,
)
def test_gaussian_weights_are_as_close_as_measured(shape, most):
    W = gaussian(256, 256)
    assert (
        2 ** (-2 * sum(shape.widths) / shape.group) * 0.8
        < error_of(quantize(W, shape), W, even(256, 256))
        <= most
    )


def test_a_second_stage_pays_and_rounds_pay():
    W = gaussian(128, 128)
    one, two = (
        error_of(quantize(W, ProductShape(8, w)), W, even(128, 128)) for w in ((4,), (4, 4))
    )
    assert two < 0.7 * one
    few, many = (
        error_of(
            quantize(W, ProductShape(8, (6, 6)), config=KMeansConfig(rounds=n)), W, even(128, 128)
        )
        for n in (1, 6)
    )
    assert many < few


def test_a_wider_beam_finds_better_pairs():
    W = gaussian(128, 128)
    narrow, wide = (
        error_of(
            quantize(W, ProductShape(8, (6, 6)), config=KMeansConfig(beam=n)), W, even(128, 128)
        )
        for n in (1, 8)
    )
    assert wide < 0.97 * narrow


def test_importance_steers_the_error():
    W, importance = gaussian(), importance_of()
    importance.input[:8] = 50.0
    aware, blind = (
        error_of(quantize(W, ProductShape(8, (4,)), known), W, importance)
        for known in (importance, even(64, 96))
    )
    assert aware < 0.9 * blind


def test_row_scales_take_rows_of_any_size():
    W = gaussian() * torch.logspace(-12, 6, 64).unsqueeze(-1)
    f = quantize(W, ProductShape(4, (6,)))
    errors = relative_error(W.unsqueeze(1), f.dense().unsqueeze(1))  # of each row
    assert errors.max() < 0.35


def test_zero_and_constant_rows_are_kept_as_they_are():
    W = gaussian()
    W[3], W[5] = 0.0, 0.25
    f = quantize(W, ProductShape(8, (4,), 2))
    assert f.dense().isfinite().all() and (f.dense()[3] == 0).all()
    assert relative_error(W[5:6], f.dense()[5:6]) < 0.7
    for value in (0.0, 0.25, -3.0):
        W = torch.full((16, 32), value)
        torch.testing.assert_close(quantize(W, ProductShape(4, (4, 4))).dense(), W)


def test_a_batch_gives_what_its_members_give_alone_but_for_the_draws():
    W = torch.stack([gaussian(seed=0), gaussian(seed=1)])
    known = [importance_of(seed=2), importance_of(seed=3)]
    shape = ProductShape(8, (4, 4), 2)
    batch = quantize(W, shape, stack(known, W))
    first = quantize(W[0], shape, known[0])
    assert batch.dense().shape == W.shape and len(batch.unbind()) == 2
    torch.testing.assert_close(batch.unbind()[0].dense(), first.dense())
    torch.testing.assert_close(batch.dense()[1], batch.unbind()[1].dense())
    assert batch.bits == first.bits and batch.shape == shape


def test_the_same_generator_gives_the_same_factors():
    W, shape = gaussian(), ProductShape(8, (4,), 2)
    first, again, other = (quantize(W, shape, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.dense(), again.dense())
    assert not torch.equal(first.dense(), other.dense())


def test_normalized_factors_mean_the_same_with_codebooks_of_size_one():
    f = quantize(gaussian() * 1e-3, ProductShape(8, (4, 4), 2))
    doubled = ProductFactors(tuple(3 * C for C in f.codebooks), f.indices, f.scale / 3, f.d_in)
    same = doubled.normalized()
    torch.testing.assert_close(same.codebooks[0].square().mean((-2, -1)), torch.ones(2))
    torch.testing.assert_close(same.dense(), f.dense())
    nothing = quantize(torch.zeros(16, 32), ProductShape(8, (4,))).normalized()
    assert nothing.dense().isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(W=torch.full((64, 96), float("nan"))),
            r"weight of shape \(64, 96\) holds non-finite",
        ),
        (dict(importance=importance_of(64, 95)), "do not fit a weight"),
        (dict(importance=Importance(torch.zeros(96), torch.ones(64))), "input importances must be"),
        (
            dict(importance=Importance(torch.ones(96), -torch.ones(64))),
            "output importances must be",
        ),
        (
            dict(shape=ProductShape(8, (10,))),
            "768 groups of 8 a codebook, fewer than its 1024 entries",
        ),
        (dict(shape=ProductShape(8, (4,), 5)), "take a divisor of 64"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_input_is_refused_by_name(change, message):
    given = dict(W=gaussian(), shape=ProductShape(8, (4,))) | change
    with pytest.raises(ValueError, match=message):
        quantize(**given)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"beam": 0}], ids=str)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KMeansConfig(**settings)
