"""Bits to ranks and back: the accounting of one layer and of a whole model, stated once.

A layer of rank r stores r (d_out + d_in) sign bits and d_out + d_in scales (Eq. 58, 59). The budget belongs to
the model: what rounding a rank down to a multiple leaves over is given back to the layers that lost most.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How many bits the quantized linears may take, and in which steps ranks come."""

    bits: float = 1.0
    """Bits per weight over all quantized linears, signs and scales counted (embeddings, head, norms are not)."""
    rank_multiple: int = 32
    """Ranks are multiples of this and at least this; kernels want 32 or more."""
    scale_bits: int = 16
    """Bits of one stored scale."""

    def __post_init__(self) -> None:
        if not self.bits > 0:
            raise ValueError(
                f"bits must be above 0, got {self.bits}; usual values are 1.0, 0.8 and 0.55"
            )
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {self.rank_multiple}")
        if self.scale_bits != 16:
            raise ValueError(
                f"scales are stored as bfloat16, so scale_bits must be 16, got {self.scale_bits}"
            )


def layer_bits(d_out: int, d_in: int, rank: int, scale_bits: int) -> int:
    """Stored bits of one layer: signs and scales (Eq. 58)."""
    return (rank + scale_bits) * (d_out + d_in)


def real_rank(d_out: int, d_in: int, bits: float, scale_bits: int) -> float:
    """The unrounded rank at which a layer takes exactly ``bits`` per weight (Eq. 59 solved for r)."""
    return bits * d_out * d_in / (d_out + d_in) - scale_bits


def largest_rank(d_out: int, d_in: int, multiple: int) -> int:
    """Largest multiple not above min(d_out, d_in), or that minimum itself where it is smaller than a multiple."""
    smaller = min(d_out, d_in)
    return max(smaller // multiple * multiple, min(smaller, multiple))


def body_bits(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], scale_bits: int
) -> float:
    """Bits per weight of the quantized linears together (Eq. 60)."""
    used = sum(layer_bits(*shapes[name], rank, scale_bits) for name, rank in ranks.items())
    return used / sum(shapes[name][0] * shapes[name][1] for name in ranks)


def allocate_ranks(shapes: Mapping[str, tuple[int, int]], config: BudgetConfig) -> dict[str, int]:
    """Choose one rank per layer so that the model takes at most, and almost exactly, the asked bits.

    Args:
        shapes: layer name to (d_out, d_in).
        config: bits, rank step and scale width.

    Returns:
        Layer name to rank; the rank that equal bits per weight ask for, rounded down, then raised one
        step at a time where rounding took the largest share.

    Raises:
        ValueError: the budget is below what the smallest ranks cost or above what the shapes can hold.
    """
    step, scale_bits = config.rank_multiple, config.scale_bits
    cap = {name: largest_rank(*shape, step) for name, shape in shapes.items()}
    least = {name: min(step, cap[name]) for name in shapes}
    low, high = body_bits(shapes, least, scale_bits), body_bits(shapes, cap, scale_bits)
    if not low <= config.bits <= high:
        raise ValueError(
            f"bits={config.bits} can't be met with these shapes: rank {step} takes {low:.4f} bits per weight and "
            f"full rank {high:.4f}; ask for a value between the two"
        )
    wanted = {name: real_rank(*shape, config.bits, scale_bits) for name, shape in shapes.items()}
    ranks = {
        name: min(cap[name], max(least[name], int(wanted[name] // step) * step)) for name in shapes
    }
    budget = int(config.bits * sum(d_out * d_in for d_out, d_in in shapes.values()))
    return _spend(shapes, ranks, wanted, least, cap, budget, config)


def _spend(
    shapes: Mapping[str, tuple[int, int]],
    ranks: dict[str, int],
    wanted: Mapping[str, float],
    least: Mapping[str, int],
    cap: Mapping[str, int],
    budget: int,
    config: BudgetConfig,
) -> dict[str, int]:
    """Take steps back while the budget is exceeded, then hand out what is left."""
    step = config.rank_multiple

    def excess(name: str) -> float:
        return (ranks[name] - wanted[name]) / max(wanted[name], 1.0)

    used = sum(layer_bits(*shapes[name], rank, config.scale_bits) for name, rank in ranks.items())
    while used > budget:
        name = max((name for name in ranks if ranks[name] > least[name]), key=excess)
        ranks[name] -= step
        used -= step * sum(shapes[name])
    heap = [(excess(name), name) for name in ranks]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        cost = step * sum(shapes[name])
        if ranks[name] + step > cap[name] or used + cost > budget:
            continue  # a step that does not fit now never will
        ranks[name] += step
        used += cost
        heapq.heappush(heap, (excess(name), name))
    return ranks
