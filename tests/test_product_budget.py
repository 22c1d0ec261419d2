"""Bits of looked-up linears, and plans that meet a budget."""

import pytest
import torch

from nanoquant.importance import Importance
from nanoquant.methods import body_bits
from nanoquant.product import KMeansInitializer
from nanoquant.product_budget import (
    MENU,
    ProductShape,
    hull_of,
    options_of,
    plan_product,
    product_bits,
)
from nanoquant_kernels import pack_indices

SMALL = {  # the linears of a block of a model of 135M, four blocks of it
    f"{block}.{name}": shape
    for block in range(4)
    for name, shape in {
        "q": (576, 576),
        "k": (192, 576),
        "v": (192, 576),
        "o": (576, 576),
        "gate": (1536, 576),
        "up": (1536, 576),
        "down": (576, 1536),
    }.items()
}
LARGE = {
    f"{block}.{n}": shape
    for block in range(32)
    for n, shape in enumerate([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
}
TARGETS = [0.3, 0.55, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "shape", [ProductShape(8, (8,)), ProductShape(5, (6, 10), 4), ProductShape(16, (12,))], ids=str
)
def test_bits_are_those_of_the_stored_tensors(shape):
    d_out, d_in = 72, 100
    groups = -(-d_in // shape.group)
    stored = 16 * d_out  # scales
    for width in shape.widths:
        stored += 8 * pack_indices(torch.zeros(d_out, groups, dtype=torch.int16), width).numel()
        stored += 16 * torch.empty(shape.slabs, 2**width, shape.group).numel()
    assert product_bits(d_out, d_in, shape) == stored


def test_padding_is_counted():
    shape = ProductShape(8, (8,))
    assert product_bits(64, 57, shape) == product_bits(64, 64, shape)


@pytest.mark.parametrize("bits", TARGETS)
@pytest.mark.parametrize(("shapes", "gap"), [(SMALL, 1e-3), (LARGE, 1e-3)], ids=["small", "large"])
def test_a_plan_takes_at_most_and_almost_exactly_the_asked_bits(shapes, gap, bits):
    plan = plan_product(shapes, bits)
    assert bits * (1 - gap) <= body_bits(shapes, plan) <= bits
    for name, shape in plan.items():
        shape.check(*shapes[name])


def test_a_plan_is_the_same_every_time_and_for_any_process():
    assert plan_product(SMALL, 1.0) == plan_product(dict(SMALL), 1.0)


def expected_loss(shapes, plan):
    losses = {(size, o.shape): o.loss for size in set(shapes.values()) for o in options_of(*size)}
    return sum(losses[shapes[name], shape] for name, shape in plan.items())


@pytest.mark.parametrize("bits", TARGETS)
def test_no_uniform_choice_within_the_budget_is_better(bits):
    loss = expected_loss(SMALL, plan_product(SMALL, bits))
    for group, widths in MENU:
        same = {name: ProductShape(group, widths) for name in SMALL}
        if body_bits(SMALL, same) <= bits:
            offered = all(
                any(o.shape == same[name] for o in options_of(*size))
                for name, size in SMALL.items()
            )
            assert not offered or loss <= expected_loss(SMALL, same)


def test_more_bits_never_plan_more_loss():
    losses = [expected_loss(SMALL, plan_product(SMALL, bits)) for bits in TARGETS]
    assert losses == sorted(losses, reverse=True)


def test_linears_of_one_shape_get_neighbouring_quality():
    plan = plan_product(SMALL, 1.0)
    for role in ("q", "gate"):
        sizes = {SMALL[name] for name in SMALL if name.endswith(role)}
        losses = {
            o.loss
            for size in sizes
            for o in options_of(*size)
            for name, shape in plan.items()
            if name.endswith(role) and o.shape == shape
        }
        assert max(losses) <= 1.6 * min(losses)


def test_steps_up_the_hull_gain_less_and_less():
    hull = hull_of(options_of(576, 576))
    gains = [(a.loss - b.loss) / (b.bits - a.bits) for a, b in zip(hull, hull[1:], strict=False)]
    assert len(gains) > 5 and gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("bits", [0.05, 9.0])
def test_a_budget_that_cant_be_met_is_refused_with_the_nearest_that_can(bits):
    with pytest.raises(ValueError, match="the nearest that can is") as caught:
        plan_product(SMALL, bits)
    nearest = float(str(caught.value).rpartition(" ")[2])
    assert (
        abs(
            body_bits(SMALL, plan_product(SMALL, nearest + (1e-4 if bits < 1 else -1e-4))) - nearest
        )
        < 0.02
    )


def test_a_menu_of_one_kind_is_kept_to():
    plan = plan_product(SMALL, 1.3, {(8, (8,)): 0.32})
    assert {(shape.group, shape.widths) for shape in plan.values()} == {(8, (8,))}


def test_a_layer_that_is_too_small_for_every_codebook_is_named():
    with pytest.raises(ValueError, match=r"tiny of shape \(4, 8\)"):
        plan_product(SMALL | {"tiny": (4, 8)}, 1.0)


@pytest.mark.parametrize("kind", [k for k in MENU if k[0] <= 8 and max(k[1]) <= 8], ids=str)
@pytest.mark.parametrize("slabs", [1, 4])
def test_options_say_what_gaussian_weights_lose(kind, slabs):
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    even = Importance(torch.ones(256), torch.ones(256))
    shape = ProductShape(*kind, slabs)
    options = {o.shape: o.loss for o in options_of(256, 256, {kind: MENU[kind]})}
    if shape in options:
        factors = KMeansInitializer()(W, even, shape)
        loss = float((factors.dense() - W).square().sum() / W.square().sum())
        assert loss == pytest.approx(options[shape] / 256**2, rel=0.12 * len(kind[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (8,)), "group and slabs"),
        ((8, (8,), 0), "group and slabs"),
        ((8, (7,)), "4, 6, 8, 10, 12 bits, got 7"),
        ((8, ()), "one stage or a second"),
        ((8, (4, 4, 4)), "one stage or a second"),
    ],
    ids=str,
)
def test_shapes_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProductShape(*arguments)


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="layers.0.q of shape .* fewer than its 4096 entries"):
        ProductShape(8, (12,)).check(64, 96, "layers.0.q")
    with pytest.raises(ValueError, match="layers.0.q of shape .* take a divisor of 64"):
        ProductShape(8, (4,), 3).check(64, 96, "layers.0.q")
