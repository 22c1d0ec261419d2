"""Ranks meet the asked bits over the whole model, and bits come back from ranks."""

import math
import random

import pytest

from nanoquant.budget import (
    SCALE_BITS,
    BudgetConfig,
    allocate_ranks,
    body_bits,
    largest_rank,
    layer_bits,
    real_rank,
    used_bits,
)
from nanoquant.packed_linear import PackedBinaryLinear

SMALL_LLAMA = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SMALL_LLAMA |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
LLAMA_7B = {"q": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}


def model_shapes(block, blocks):
    return {f"{b}.{name}": shape for b in range(blocks) for name, shape in block.items()}


@pytest.mark.parametrize("bits", [1.0, 0.8, 0.55])
def test_a_small_llama_takes_at_most_and_almost_exactly_the_asked_bits(bits):
    shapes = model_shapes(SMALL_LLAMA, 30)
    ranks = allocate_ranks(shapes, BudgetConfig(bits=bits))
    used = body_bits(shapes, ranks)
    assert 0.985 * bits <= used <= bits
    assert used == sum((r + 16) * sum(shapes[n]) for n, r in ranks.items()) / sum(
        a * b for a, b in shapes.values()
    )


@pytest.mark.parametrize("bits", [0.4, 0.55, 1.0, 1.37, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("step", [1, 8, 32, 64])
def test_ranks_are_multiples_within_the_shape_and_the_budget_holds(bits, step):
    shapes = model_shapes(SMALL_LLAMA, 2)
    ranks = allocate_ranks(shapes, BudgetConfig(bits=bits, rank_multiple=step))
    assert ranks.keys() == shapes.keys()
    for name, rank in ranks.items():
        times = 1 if bits <= 1 else 2
        assert rank % step == 0 and step <= rank <= times * min(shapes[name])
    assert 0.95 * bits < body_bits(shapes, ranks) <= bits


@pytest.mark.parametrize("bits", [1.5, 2.0])
def test_budgets_beyond_full_rank_go_to_every_layer_at_almost_equal_bits(bits):
    shapes = model_shapes(SMALL_LLAMA, 30)
    ranks = allocate_ranks(shapes, BudgetConfig(bits=bits))
    assert 0.995 * bits < body_bits(shapes, ranks) <= bits
    assert all(abs(ranks[name] - real_rank(*shape, bits)) < 32 for name, shape in shapes.items())
    assert ranks["0.up"] > 576 and ranks["0.k"] > 192 and ranks["0.q"] <= 576


def test_two_bits_take_the_size_that_the_paper_reports():
    shapes = model_shapes(
        {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}, 32
    )
    shapes |= model_shapes({"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}, 32)
    ranks = allocate_ranks(shapes, BudgetConfig(bits=2.0))
    tables = 2 * 2 * 32000 * 4096  # embedding and head, bfloat16
    assert (used_bits(shapes, ranks) / 8 + tables) / 1e9 == pytest.approx(2.14, abs=0.01)
    assert ranks["0.up"] > 4096


def test_the_rank_of_the_papers_table_is_the_real_rank_rounded_down():
    floors = {name: int(real_rank(*shape, 1.0)) // 32 * 32 for name, shape in LLAMA_7B.items()}
    assert floors == {"q": 2016, "up": 2944, "down": 2944}
    ranks = allocate_ranks(model_shapes(LLAMA_7B, 32), BudgetConfig(bits=1.0))
    names = {name: name.split(".")[1] for name in ranks}
    assert all(floors[names[n]] <= rank <= floors[names[n]] + 32 for n, rank in ranks.items())


def test_bits_and_rank_are_inverse():
    assert layer_bits(1536, 576, 96) == 96 * 2112 + SCALE_BITS * 2112
    assert real_rank(1536, 576, layer_bits(1536, 576, 96) / (1536 * 576)) == pytest.approx(96)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(64, 96, 32), (24, 41, 17), (7, 3, 1)])
def test_the_bits_of_a_layer_are_those_that_its_packed_tensors_take(d_out, d_in, rank):
    assert layer_bits(d_out, d_in, rank) == PackedBinaryLinear(d_in, d_out, rank, False).bits


def test_what_rounding_leaves_goes_where_it_took_the_largest_share():
    shapes = {"narrow": (64, 4096), "wide": (4096, 4096)}
    ranks = allocate_ranks(shapes, BudgetConfig(bits=1.0))
    assert ranks["narrow"] == 64  # 47 is wanted; rounding it to 32 would take a third
    assert body_bits(shapes, ranks) <= 1.0


def test_a_layer_smaller_than_the_multiple_gets_its_own_size_as_rank():
    assert largest_rank(20, 100, 32, 1.0) == largest_rank(20, 100, 32, 2.0) == 20
    assert largest_rank(100, 70, 32, 1.0) == 64
    ranks = allocate_ranks({"tiny": (20, 100), "big": (512, 512)}, BudgetConfig(bits=1.0))
    assert ranks["tiny"] == 20


def test_equal_layers_get_equal_ranks_but_for_the_remainder():
    shapes = {str(i): (512, 512) for i in range(7)}
    ranks = set(allocate_ranks(shapes, BudgetConfig(bits=1.0)).values())
    assert max(ranks) - min(ranks) <= 32


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (0.05, r"rank 32 takes 0\.\d+ bits.*smaller dimension 3\.0\d+.*this one is 0\.\d+ too low"),
        (3.5, r"rank 2 times the smaller dimension 3\.0\d+.*this one is 0\.4\d+ too high"),
        (50.0, r"rank 2 times the smaller dimension 3\.0\d+.*this one is 4\d\.\d+ too high"),
    ],
)
def test_bits_that_the_shapes_cannot_meet_are_refused_with_both_limits(bits, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(SMALL_LLAMA, BudgetConfig(bits=bits))


def test_the_largest_rank_is_full_up_to_one_bit_and_grows_with_the_bits_to_twice_that():
    ranks = [largest_rank(1536, 576, 32, bits) for bits in (0.55, 1.0, 1.5, 2.0, 8.0)]
    assert ranks == [576, 576, 864, 1152, 1152]
    for bits in (1.01, 1.5, 2.0):  # what equal bits ask for is within
        for shape in SMALL_LLAMA.values():
            assert real_rank(*shape, bits) < largest_rank(*shape, 32, bits)


def limits(shapes, step, bits=math.inf):
    """Bits of the smallest and of the largest ranks."""
    cap = {name: largest_rank(*shape, step, bits) for name, shape in shapes.items()}
    least = {name: min(step, rank) for name, rank in cap.items()}
    return body_bits(shapes, least), body_bits(shapes, cap), cap


@pytest.mark.parametrize("seed", range(200))
def test_any_shapes_get_at_most_the_asked_bits_and_no_step_is_left_that_fits(seed):
    rng = random.Random(seed)
    step = rng.choice([1, 3, 8, 32])
    shapes = {str(i): (rng.randint(1, 300), rng.randint(1, 300)) for i in range(rng.randint(1, 6))}
    low, high, _ = limits(shapes, step)
    for bits in (low, high, rng.uniform(low, high), rng.uniform(low, high)):
        ranks = allocate_ranks(shapes, BudgetConfig(bits=bits, rank_multiple=step))
        *_, cap = limits(shapes, step, bits)
        assert body_bits(shapes, ranks) <= bits
        for name, rank in ranks.items():
            assert rank == cap[name] or (rank % step == 0 and step <= rank < cap[name])
            if rank < cap[name]:
                assert body_bits(shapes, ranks | {name: rank + step}) > bits
    for bits in (0.99 * low, 1.01 * high):
        with pytest.raises(ValueError, match="can't be met"):
            allocate_ranks(shapes, BudgetConfig(bits=bits, rank_multiple=step))


@pytest.mark.parametrize("bits", [0, -1.0, float("nan")])
def test_bits_that_are_not_above_zero_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be above 0"):
        BudgetConfig(bits=bits)


def test_other_fields_are_checked():
    with pytest.raises(ValueError, match="rank_multiple"):
        BudgetConfig(rank_multiple=0)
