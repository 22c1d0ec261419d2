"""Bits to ranks and back: the accounting of one layer and of a whole model, stated once.

A layer of rank r stores r (d_out + d_in) sign bits, each row of them padded to whole bytes, and d_out + d_in scales
(Eq. 58, 59). The budget belongs to the model: what rounding a rank down to a multiple leaves over is given back to
the layers that lost most.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

SCALE_BITS = 16
"""Bits of one stored scale, a bfloat16."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How many bits the quantized linears may take, and in which steps ranks come."""

    bits: float = 1.0
    """Bits per weight over all quantized linears, signs and scales counted (embeddings, head, norms are not)."""
    rank_multiple: int = 32
    """Ranks are multiples of this and at least this; kernels want 32 or more."""

    def __post_init__(self) -> None:
        if not self.bits > 0:
            raise ValueError(
                f"bits must be above 0, got {self.bits}; usual values are 1.0, 0.8 and 0.55"
            )
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {self.rank_multiple}")


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


def largest_rank(d_out: int, d_in: int, multiple: int) -> int:
    """Largest multiple not above min(d_out, d_in), or that minimum itself where it is smaller than a multiple."""
    smaller = min(d_out, d_in)
    return max(smaller // multiple * multiple, min(smaller, multiple))


def body_bits(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> float:
    """Bits per weight of the quantized linears together (Eq. 60)."""
    weights = sum(shapes[name][0] * shapes[name][1] for name in ranks)
    return _used_bits(shapes, ranks) / weights


def _used_bits(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> int:
    """Stored bits of all layers."""
    return sum(layer_bits(*shapes[name], rank) for name, rank in ranks.items())


def allocate_ranks(shapes: Mapping[str, tuple[int, int]], config: BudgetConfig) -> dict[str, int]:
    """Choose one rank per layer so that the model takes at most, and almost exactly, the asked bits.

    Args:
        shapes: layer name to (d_out, d_in).
        config: bits and rank step.

    Returns:
        Layer name to rank; the rank that equal bits per weight ask for, rounded down, then raised one
        step at a time where rounding took the largest share.

    Raises:
        ValueError: the budget is below what the smallest ranks cost or above what the shapes can hold.
    """
    step = config.rank_multiple
    cap = {name: largest_rank(*shape, step) for name, shape in shapes.items()}
    least = {name: min(step, cap[name]) for name in shapes}
    low, high = body_bits(shapes, least), body_bits(shapes, cap)
    if not low <= config.bits <= high:
        raise ValueError(
            f"bits={config.bits} can't be met with these shapes: rank {step} takes {low:.4f} bits per weight and "
            f"full rank {high:.4f}; ask for a value between the two"
        )
    wanted = {name: real_rank(*shape, config.bits) for name, shape in shapes.items()}
    ranks = {
        name: min(cap[name], max(least[name], int(wanted[name] // step) * step)) for name in shapes
    }
    budget = _whole_bits(config.bits, sum(d_out * d_in for d_out, d_in in shapes.values()))
    return _spend(shapes, ranks, wanted, least, cap, budget, step)


def _whole_bits(bits: float, weights: int) -> int:
    """The most bits that are, per weight, at most ``bits``: as :func:`body_bits` divides, so both always agree."""
    near = int(bits * weights)  # the product may be rounded across a whole number
    return next(n for n in (near + 1, near, near - 1) if n / weights <= bits)


def _spend(
    shapes: Mapping[str, tuple[int, int]],
    ranks: dict[str, int],
    wanted: Mapping[str, float],
    least: Mapping[str, int],
    cap: Mapping[str, int],
    budget: int,
    step: int,
) -> dict[str, int]:
    """Take steps back while the budget is exceeded, then hand out what is left."""

    def excess(name: str) -> float:
        return (ranks[name] - wanted[name]) / max(wanted[name], 1.0)

    def cost(name: str, rank: int) -> int:
        return layer_bits(*shapes[name], rank) - layer_bits(*shapes[name], ranks[name])

    used = _used_bits(shapes, ranks)
    while used > budget:
        name = max((name for name in ranks if ranks[name] > least[name]), key=excess)
        used += cost(name, ranks[name] - step)
        ranks[name] -= step
    heap = [(excess(name), name) for name in ranks]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        rank = ranks[name] + step
        if rank > cap[name] or used + cost(name, rank) > budget:
            continue  # a step that does not fit now never will
        used += cost(name, rank)
        ranks[name] = rank
        heapq.heappush(heap, (excess(name), name))
    return ranks
