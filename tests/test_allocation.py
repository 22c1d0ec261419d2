"""Ranks by depth, kind and measured loss: published tables, the closed form, and never more than the asked bits."""

import math
import random
import re

import pytest

from nanoquant.allocation import (
    EXPONENTS,
    Response,
    allocate_by_loss,
    allocate_by_prior,
    fit_response,
    prior_ranks,
    spend_by_loss,
)
from nanoquant.budget import (
    BudgetConfig,
    RankLimits,
    allocate_ranks,
    body_bits,
    largest_rank,
    rank_limits,
    real_rank,
    round_ranks,
    step_bits,
    used_bits,
)
from nanoquant.role_weights import RoleWeights
from nanoquant.roles import Place

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def model(hidden, attention, kv, mlp, blocks):
    """Shapes and places of a model of the Llama layout."""
    sizes = [(attention, hidden), (kv, hidden), (kv, hidden), (hidden, attention)]
    sizes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
    shapes, places = {}, {}
    for b in range(blocks):
        for role, shape in zip(ROLES, sizes, strict=True):
            shapes[f"{b}.{role}"] = shape
            places[f"{b}.{role}"] = Place(b / (blocks - 1), role)
    return shapes, places


QWEN3 = {"0.6B": (1024, 2048, 1024, 3072, 28), "4B": (2560, 4096, 1024, 9728, 36)}
SMOL = (576, 576, 192, 1536, 30)


def what_uniform_spends(shapes):
    """Limits of the published tables: the bits of uniform ranks rounded down, and no clamp."""
    cap = {name: largest_rank(*shape, 32, 1.0) for name, shape in shapes.items()}
    floors = {name: int(real_rank(*shape, 1.0)) // 32 * 32 for name, shape in shapes.items()}
    least = dict.fromkeys(shapes, 32)
    return floors, RankLimits(least, cap, used_bits(shapes, floors), 32)


@pytest.mark.parametrize(
    ("size", "uniform", "bits", "first", "last", "at_cap"),
    [
        ("0.6B", "640 480 736", 0.9728, "384 288 384 512 608", "736 576 704 960 992", 0),
        ("4B", "1536 704 1984", 0.9864, "928 448 544 1408 1600", "1696 832 1024 2560 2560", 15),
    ],
)
def test_the_prior_gives_the_published_tables(size, uniform, bits, first, last, at_cap):
    shapes, places = model(*QWEN3[size])
    floors, limits = what_uniform_spends(shapes)
    assert [floors[f"0.{role}"] for role in ("q", "k", "up")] == list(map(int, uniform.split()))
    assert body_bits(shapes, floors) == pytest.approx(bits, abs=2e-4)
    prior = BudgetConfig(allocation="prior", depth_slope=0.6)
    ranks = round_ranks(shapes, prior_ranks(shapes, places, prior, limits), limits)
    for block, expected in ((0, first), (QWEN3[size][-1] - 1, last)):
        chosen = [ranks[f"{block}.{role}"] for role in ("q", "k", "v", "gate", "down")]
        assert chosen == list(map(int, expected.split()))
    assert sum(ranks[name] == limits.cap[name] for name in ranks) == at_cap
    assert body_bits(shapes, ranks) <= body_bits(shapes, floors)


def random_responses(shapes, seed, slow=0.5, fast=1.5):
    rng = random.Random(seed)
    return {n: Response(rng.gauss(0, 1), rng.uniform(slow, fast)) for n in shapes}


def closed_form(shapes, responses, limits):
    """r = (b e^a / (mu (d_out + d_in)))^(1 / (1 + b)) within the limits, mu by bisection."""

    def ranks(mu):
        return {
            name: min(
                max(
                    (r.exponent * math.exp(r.level) / (mu * sum(shapes[name])))
                    ** (1 / (1 + r.exponent)),
                    limits.least[name],
                ),
                limits.cap[name],
            )
            for name, r in responses.items()
        }

    low, high = -60.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        used = sum((r + 16) * sum(shapes[name]) for name, r in ranks(math.exp(middle)).items())
        low, high = (middle, high) if used > limits.budget else (low, middle)
    return ranks(math.exp(high))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [1.0, 0.8, 0.55])
def test_steps_by_gain_reach_the_closed_form_within_one_step(seed, bits):
    shapes, _ = model(*SMOL)
    limits = rank_limits(shapes, BudgetConfig(bits=bits, allocation="measured"))
    responses = random_responses(shapes, seed)
    ranks = spend_by_loss(shapes, responses, limits)
    best = closed_form(shapes, responses, limits)
    assert max(abs(ranks[name] - best[name]) for name in shapes) <= 32


ALLOCATIONS = {
    "uniform": lambda s, p, c: allocate_ranks(s, c),
    "prior": allocate_by_prior,
    "measured": lambda s, p, c: allocate_by_loss(s, p, random_responses(s, 0), c),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("bits", [2.5, 2.0, 1.5, 1.0, 0.8, 0.55, 0.4])
@pytest.mark.parametrize("sizes", [SMOL, *QWEN3.values()], ids=["smol", *QWEN3])
def test_every_allocation_takes_the_same_bits_within_the_cheapest_step(allocation, bits, sizes):
    shapes, places = model(*sizes)
    config = BudgetConfig(bits=bits, allocation=allocation)
    ranks, limits = ALLOCATIONS[allocation](shapes, places, config), rank_limits(shapes, config)
    free = [name for name in ranks if ranks[name] < limits.cap[name]]
    cheapest = min(step_bits(shapes[name], ranks[name], 32) for name in free)
    assert 0 <= limits.budget - used_bits(shapes, ranks) < cheapest
    assert body_bits(shapes, ranks) <= bits
    assert all(r % 32 == 0 and limits.least[n] <= r <= limits.cap[n] for n, r in ranks.items())


@pytest.mark.parametrize("allocation", ["prior", "measured"])
def test_ranks_stay_within_their_limits_around_the_uniform_ones(allocation):
    shapes, places = model(*SMOL)
    config = BudgetConfig(allocation=allocation, low=0.8, high=1.25, depth_slope=3.0)
    ranks = ALLOCATIONS[allocation](shapes, places, config)
    for name, rank in ranks.items():
        uniform = real_rank(*shapes[name], 1.0)
        assert 0.8 * uniform - 32 < rank < 1.25 * uniform + 32
    equal = BudgetConfig(allocation=allocation, low=1.0, high=1.0)
    ranks = ALLOCATIONS[allocation](shapes, places, equal)
    assert all(abs(r - real_rank(*shapes[n], 1.0)) < 32 for n, r in ranks.items())


@pytest.mark.parametrize("cap", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("allocation", ["prior", "measured"])
def test_a_very_large_high_leaves_only_the_limits_of_the_shapes(allocation, cap):
    shapes, _ = model(*SMOL)
    limits = rank_limits(shapes, BudgetConfig(allocation=allocation, high=1e9, rank_cap=cap))
    assert limits.cap == {name: cap * min(shape) // 32 * 32 for name, shape in shapes.items()}


def test_more_bits_than_the_cap_raise_it_and_a_cap_that_changes_nothing_or_is_none_is_refused():
    shapes, _ = model(*SMOL)
    wide = [
        rank_limits(shapes, BudgetConfig(bits=2.0, allocation="measured", rank_cap=cap)).cap
        for cap in (1.0, 2.0)
    ]
    assert wide[0] == wide[1]
    with pytest.raises(
        ValueError, match=r"budget\.rank_cap and budget\.allocation=uniform exclude"
    ):
        BudgetConfig(rank_cap=2.0)
    for cap in (0.9, 2.1, math.nan):
        with pytest.raises(ValueError, match="rank_cap must lie between 1 and 2, got"):
            BudgetConfig(allocation="measured", rank_cap=cap)


def test_a_cap_above_full_rank_gives_a_costly_linear_more():
    shapes, places = model(*SMOL)
    responses = {name: Response(0.0, 1.0) for name in shapes} | {"0.up": Response(9.0, 1.0)}
    narrow, wide = (
        allocate_by_loss(
            shapes, places, responses, BudgetConfig(allocation="measured", rank_cap=cap)
        )
        for cap in (1.0, 2.0)
    )
    assert narrow["0.up"] == 576 < wide["0.up"]


def test_a_neutral_prior_is_the_uniform_allocation():
    shapes, places = model(*SMOL)
    neutral = RoleWeights(**dict.fromkeys(ROLES, 1.0))
    config = BudgetConfig(bits=0.8, allocation="prior", roles=neutral)
    assert allocate_by_prior(shapes, places, config) == allocate_ranks(shapes, config)


def test_depth_acts_on_measured_ranks_and_a_slope_of_zero_switches_it_off():
    shapes, places = model(*SMOL)
    same = {name: Response(level, 1.0) for name, level in zip(shapes, [0.0] * 210, strict=True)}
    for slope, grows in ((0.6, True), (0.0, False)):
        config = BudgetConfig(bits=0.55, allocation="measured", depth_slope=slope)
        ranks = allocate_by_loss(shapes, places, same, config)
        assert (ranks["29.up"] > ranks["0.up"] + 32) is grows


def test_the_weight_of_a_fused_role_is_the_mean_of_its_parts_and_of_an_unknown_one_1():
    roles = RoleWeights()
    assert roles.of("q+k+v") == pytest.approx((0.85 + 0.9 + 1.1) / 3)
    assert (roles.of("gate+up"), roles.of("down"), roles.of("")) == (1.025, 1.15, 1.0)


def test_a_power_law_is_fitted_exactly_and_the_loss_is_met_at_its_rank():
    fit = fit_response({r: 5.0 * r**-0.8 for r in (96, 192, 288)}, loss=0.3, rank=192)
    assert fit.exponent == pytest.approx(0.8) and fit.loss(192) == pytest.approx(0.3)
    assert fit.loss(384) == pytest.approx(0.3 * 2**-0.8)


@pytest.mark.parametrize(
    ("errors", "exponent"),
    [
        ({64: 1.0, 128: 1.1}, EXPONENTS[0]),
        ({64: 1.0, 128: 1e-9}, EXPONENTS[1]),
        ({64: 1.0}, 1.0),
        ({64: 1.0, 128: 0.0}, EXPONENTS[1]),
    ],
    ids=["rising", "falling", "alone", "zero"],
)
def test_exponents_stay_where_they_make_sense(errors, exponent):
    fit = fit_response(errors, loss=0.0, rank=64)
    assert fit.exponent == exponent and math.isfinite(fit.level)


def test_limits_that_leave_the_budget_out_of_reach_say_by_how_much():
    shapes = {"a": (512, 512), "b": (512, 4096)}
    config = BudgetConfig(bits=3.0, allocation="prior", high=1.0)
    with pytest.raises(ValueError, match=r"smaller dimension 2\.4826.*this one is 0\.\d+ too high"):
        rank_limits(shapes, config)
    shapes = {f"a{i}": (64, 64) for i in range(40)} | {"b": (512, 4096)}
    config = BudgetConfig(bits=0.4, rank_multiple=64, allocation="prior", low=1.0)
    with pytest.raises(ValueError, match=r"low=1\.0 .*this one is 0\.\d+ too low"):
        rank_limits(shapes, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allocation": "best"}, "uniform, prior, measured, got 'best'"),
        ({"bits": float("inf")}, "bits must be above 0, got (inf|nan), and finite"),
        ({"bits": float("nan")}, "bits must be above 0, got (inf|nan), and finite"),
        ({"low": 1.5}, "low must lie in 0..1"),
        ({"high": float("inf")}, "high be finite"),
        ({"high": 0.5}, "high be finite and at least 1"),
        ({"depth_slope": float("nan")}, "depth_slope"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BudgetConfig(**fields)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_of_roles_that_are_not_above_zero_are_refused(value):
    with pytest.raises(ValueError, match=r"roles\.down must be above 0"):
        RoleWeights(down=value)


def test_a_prior_that_runs_into_the_limits_says_where_and_by_how_much(caplog):
    shapes, places = model(*SMOL)
    allocate_by_prior(shapes, places, BudgetConfig(allocation="prior", depth_slope=0.3))
    assert not caplog.text
    allocate_by_prior(shapes, places, BudgetConfig(allocation="prior", depth_slope=3.0))
    assert re.search(
        r"\d+ of 210 linears can't have the rank .*, 29\.\w+ \d+ instead of \d+", caplog.text
    )
