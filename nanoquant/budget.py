"""Bits to ranks and back: the accounting of one layer and of a whole model, stated once.

A layer of rank r stores r (d_out + d_in) sign bits, each row of them padded to whole bytes, and d_out + d_in scales
(Eq. 58, 59). The budget belongs to the model: what rounding a rank down to a multiple leaves over is given back to
the layers that lost most. Other allocations than the uniform one are in ``allocation``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanoquant.role_weights import RoleWeights
from nanoquant.units import parse_bytes

SCALE_BITS = 16
"""Bits of one stored scale, a bfloat16."""
WIDEST = 2
"""Largest rank over the smaller dimension of a weight, about 3 bits; from there on grouped integers are as good."""
ALLOCATIONS = ("uniform", "prior", "measured")
Shapes = Mapping[str, tuple[int, int]]
"""Layer name to (d_out, d_in)."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How many bits the quantized linears may take, and in which steps ranks come."""

    bits: float = 1.0
    """Bits per weight over all quantized linears, to about 3; signs and scales count (embeddings, head, norms not)."""
    file: str | None = None
    """Bytes of the weight files together, such as 70MB, in the place of bits: linears get what the rest leaves."""
    rank_multiple: int = 32
    """Ranks are multiples of this and at least this; kernels want 32 or more."""
    allocation: str = "uniform"
    """uniform: equal bits per weight; prior: by depth and kind of linear; measured: by loss, see sensitivity."""
    depth_slope: float = 0.0
    """Prior and measured: the last block's share over the first's is exp of this; 0: depth does not matter. 0.6 is
    published for models of 0.6B and 4B; the prior with it cost one of 135M 0.12 nats a token in ten blocks."""
    roles: RoleWeights = field(default_factory=RoleWeights)
    """Prior: weight of each kind of linear."""
    low: float = 0.5
    """Prior and measured: smallest rank of a linear, relative to the uniform one."""
    high: float = 2.0
    """Prior and measured: largest rank of a linear, relative to the uniform one."""
    rank_cap: float = 1.0
    """Prior and measured: largest rank of a linear, relative to the smaller dimension of its weight: 1, full rank as
    published, to 2. The bits are the least that it can be."""

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise ValueError(
                f"bits must be above 0, got {self.bits}, and finite; usual values are 1.0, 0.8 and 0.55"
            )
        if self.file is not None:
            parse_bytes(self.file, "budget.file")
            if self.bits != type(self).bits:
                raise ValueError(
                    f"budget.bits={self.bits} and budget.file={self.file} exclude each other: the file's size "
                    "decides the bits; give one of the two"
                )
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {self.rank_multiple}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(
                f"allocation must be one of {', '.join(ALLOCATIONS)}, got {self.allocation!r}"
            )
        if not abs(self.depth_slope) < 10:
            raise ValueError(
                f"depth_slope must lie between -10 and 10, got {self.depth_slope}; 0 is neutral"
            )
        if not 1 <= self.rank_cap <= WIDEST:
            raise ValueError(f"rank_cap must lie between 1 and {WIDEST}, got {self.rank_cap}")
        if not 0 <= self.low <= 1 <= self.high < math.inf:
            raise ValueError(
                f"low must lie in 0..1 and high be finite and at least 1, got {self.low} and {self.high}"
            )
        unequal = ("depth_slope", "roles", "low", "high", "rank_cap")
        idle = {"uniform": unequal, "measured": ("roles",)}
        for name in idle.get(self.allocation, ()):
            default = RoleWeights() if name == "roles" else getattr(type(self), name)
            if getattr(self, name) != default:
                raise ValueError(
                    f"budget.{name} and budget.allocation={self.allocation} exclude each other: it would change "
                    f"nothing; take allocation prior{'' if name == 'roles' else ' or measured'}, or leave it out"
                )

    @property
    def limiting_bits(self) -> float:
        """Those for :func:`largest_rank`: ``bits``, or ``rank_cap`` where ranks differ and that is more."""
        return self.bits if self.allocation == "uniform" else max(self.bits, self.rank_cap)


def layer_bits(d_out: int, d_in: int, rank: int) -> int:
    """Stored bits of one layer: scales (Eq. 58), and d_out rows of U and r columns of V in whole bytes."""
    sign_bytes = d_out * _whole_bytes(rank) + rank * _whole_bytes(d_in)
    return 8 * sign_bytes + SCALE_BITS * (d_out + d_in)


def _whole_bytes(bits: int) -> int:
    """Bytes that hold this many bits."""
    return -(-bits // 8)


def real_rank(d_out: int, d_in: int, bits: float) -> float:
    """The unrounded rank at which a layer takes exactly ``bits`` per weight (Eq. 59 solved for r), unpadded."""
    return bits * d_out * d_in / (d_out + d_in) - SCALE_BITS


def largest_rank(d_out: int, d_in: int, multiple: int, bits: float) -> int:
    """Largest rank that a layer may get in a model of so many bits per weight.

    Up to one bit it is full rank, as published: the largest multiple within min(d_out, d_in), the next one where
    equal bits for all layers ask for it, or that minimum where it is smaller than a multiple. Above one bit it is
    bits * min(d_out, d_in), more than equal bits ask for, and at most ``WIDEST`` times the minimum.
    """
    smaller, bits = min(d_out, d_in), min(bits, WIDEST)
    if smaller < multiple:
        return smaller
    asked = bits * smaller if bits > 1 else real_rank(d_out, d_in, bits)
    steps = max(smaller // multiple, math.ceil(asked / multiple))
    return min(steps, WIDEST * smaller // multiple) * multiple


def body_bits(shapes: Shapes, ranks: Mapping[str, int]) -> float:
    """Bits per weight of the quantized linears together (Eq. 60)."""
    return used_bits(shapes, ranks) / count_weights({name: shapes[name] for name in ranks})


def count_weights(shapes: Shapes) -> int:
    """Weights of all layers."""
    return sum(d_out * d_in for d_out, d_in in shapes.values())


def used_bits(shapes: Shapes, ranks: Mapping[str, int]) -> int:
    """Stored bits of all layers."""
    return sum(layer_bits(*shapes[name], rank) for name, rank in ranks.items())


@dataclass(frozen=True)
class RankLimits:
    """Smallest and largest rank of every layer, and the bits that all layers may take together."""

    least: Mapping[str, int]
    cap: Mapping[str, int]
    budget: int
    step: int


def rank_limits(shapes: Shapes, config: BudgetConfig) -> RankLimits:
    """Limits of the ranks under a budget; the uniform allocation knows only those of the shapes.

    Raises:
        ValueError: the budget is below what the smallest ranks cost or above what the largest hold; by how much.
    """
    step = config.rank_multiple
    cap = {name: largest_rank(*shape, step, config.limiting_bits) for name, shape in shapes.items()}
    least = {name: min(step, cap[name]) for name in shapes}
    if config.allocation != "uniform":
        for name, shape in shapes.items():
            uniform = max(real_rank(*shape, config.bits), step) / step  # in steps
            most = min(config.high * uniform, cap[name] / step)
            cap[name] = min(cap[name], math.ceil(most) * step)
            least[name] = min(cap[name], max(least[name], int(config.low * uniform) * step))
    few, many = body_bits(shapes, least), body_bits(shapes, cap)
    if not few <= config.bits <= many:
        raise ValueError(_out_of_reach(shapes, config, few, many))
    return RankLimits(least, cap, _whole_bits(config.bits, count_weights(shapes)), step)


def _out_of_reach(shapes: Shapes, config: BudgetConfig, few: float, many: float) -> str:
    """What bits can be met, and by how much these miss it; ``few`` and ``many`` are those within low and high."""
    step, bits = config.rank_multiple, config.bits
    smallest = f"the smallest ranks (low={config.low} times uniform)"
    largest = f"the largest ranks (high={config.high} times uniform)"
    cap = {name: largest_rank(*shape, step, WIDEST) for name, shape in shapes.items()}
    every = (
        body_bits(shapes, {name: min(step, cap[name]) for name in shapes}),
        body_bits(shapes, cap),
    )
    if not every[0] <= bits <= every[1]:  # whatever low and high are
        few, many = every
        smallest, largest = f"rank {step}", f"rank {WIDEST} times the smaller dimension"
    gap = few - bits if bits < few else bits - many
    return (
        f"bits={bits} can't be met with these shapes: {smallest} takes {few:.4f} bits per weight and {largest} "
        f"{many:.4f}; ask for a value between the two, this one is {gap:.4f} too {'low' if bits < few else 'high'}"
    )


def allocate_ranks(shapes: Shapes, config: BudgetConfig) -> dict[str, int]:
    """Choose one rank per layer so that the model takes at most, and almost exactly, the asked bits.

    This is the uniform allocation, whatever ``config.allocation`` says: it knows only shapes.

    Args:
        shapes: layer name to (d_out, d_in).
        config: bits and rank step.

    Returns:
        Layer name to rank; the rank that equal bits per weight ask for, rounded down, then raised one
        step at a time where rounding took the largest share.

    Raises:
        ValueError: the budget is below what the smallest ranks cost or above what the shapes can hold.
    """
    limits = rank_limits(shapes, BudgetConfig(bits=config.bits, rank_multiple=config.rank_multiple))
    return uniform_ranks(shapes, config.bits, limits)


def uniform_ranks(shapes: Shapes, bits: float, limits: RankLimits) -> dict[str, int]:
    """Ranks of equal bits per weight for every layer, but for the limits and what rounding leaves."""
    wanted = {name: real_rank(*shape, bits) for name, shape in shapes.items()}
    return round_ranks(shapes, wanted, limits)


def _whole_bits(bits: float, weights: int) -> int:
    """The most bits that are, per weight, at most ``bits``: as :func:`body_bits` divides, so both always agree."""
    near = int(bits * weights)  # the product may be rounded across a whole number
    return next(n for n in (near + 1, near, near - 1) if n / weights <= bits)


def round_ranks(shapes: Shapes, wanted: Mapping[str, float], limits: RankLimits) -> dict[str, int]:
    """Round real ranks down to steps, take steps back while the budget is exceeded, hand out what is left.

    Args:
        shapes: layer name to (d_out, d_in).
        wanted: real ranks; a step goes to, or comes from, the layer that is furthest below, or above, its own.
        limits: ranks, step and budget.
    """
    step = limits.step
    ranks = {
        name: min(limits.cap[name], max(limits.least[name], int(wanted[name] // step) * step))
        for name in shapes
    }

    def excess(name: str) -> float:
        return (ranks[name] - wanted[name]) / max(wanted[name], 1.0)

    used = used_bits(shapes, ranks)
    while used > limits.budget:
        name = max((name for name in ranks if ranks[name] > limits.least[name]), key=excess)
        used += step_bits(shapes[name], ranks[name], -step)
        ranks[name] -= step
    return hand_out(shapes, ranks, limits, used, excess)


def step_bits(shape: tuple[int, int], rank: int, step: int) -> int:
    """Bits that one more step of a layer costs."""
    return layer_bits(*shape, rank + step) - layer_bits(*shape, rank)


def hand_out(
    shapes: Shapes,
    ranks: dict[str, int],
    limits: RankLimits,
    used: int,
    order: Callable[[str], float],
) -> dict[str, int]:
    """Give steps, always to the layer that is lowest in ``order``, until none fits into the budget.

    Args:
        shapes: layer name to (d_out, d_in).
        ranks: to start from; changed and returned.
        limits: ranks, step and budget.
        used: bits of ``ranks``.
        order: of a layer, given its present rank in ``ranks``.
    """
    heap = [(order(name), name) for name in ranks]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        cost = step_bits(shapes[name], ranks[name], limits.step)
        if ranks[name] + limits.step > limits.cap[name] or used + cost > limits.budget:
            continue  # a step that does not fit now never will
        used += cost
        ranks[name] += limits.step
        heapq.heappush(heap, (order(name), name))
    return ranks
