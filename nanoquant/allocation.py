"""Ranks that differ by more than shape: by depth and kind of linear, or by measured loss. All at the same bits.

Prior: a linear at depth x (0 first block, 1 last) gets bits per weight in proportion to
m = exp(slope (x - 1/2)) w_role, and rank = bits c m d_out d_in / (d_out + d_in) - 16 with c = sum N / sum m N, N
the weights of a linear. Measured: the loss that rank r leaves in a linear is J(r) = m' exp(a) r^-b, m' the depth's
part of m; steps go, one at a time, where J falls most per bit, which for convex J is the best choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

from nanoquant.budget import (
    BudgetConfig,
    RankLimits,
    Shapes,
    count_weights,
    hand_out,
    rank_limits,
    real_rank,
    round_ranks,
    step_bits,
    used_bits,
)
from nanoquant.roles import Place

logger = logging.getLogger(__name__)

EXPONENTS = (0.05, 8.0)
"""Least and largest exponent b of a response; a fit outside is noise."""


@dataclass(frozen=True)
class Response:
    """Loss that a linear costs at rank r: exp(level) r^-exponent, in nats per token."""

    level: float
    exponent: float

    def loss(self, rank: float) -> float:
        """Loss at a rank."""
        return math.exp(self.level - self.exponent * math.log(rank))


def depth_multiplier(place: Place, slope: float) -> float:
    """What later blocks get more than earlier ones: nothing downstream repairs their errors."""
    return math.exp(slope * (place.depth - 0.5))


def prior_ranks(
    shapes: Shapes, places: Mapping[str, Place], config: BudgetConfig, limits: RankLimits
) -> dict[str, float]:
    """Real ranks of the prior within the limits; but for these they take the asked bits."""
    m = {
        name: depth_multiplier(places[name], config.depth_slope)
        * config.roles.of(places[name].role)
        for name in shapes
    }
    weighted = sum(m[name] * d_out * d_in for name, (d_out, d_in) in shapes.items())
    c = count_weights(shapes) / weighted
    wanted = {name: real_rank(*shape, config.bits * c * m[name]) for name, shape in shapes.items()}
    given = {n: min(max(rank, limits.least[n]), limits.cap[n]) for n, rank in wanted.items()}
    _tell_limits(wanted, given, limits.step)
    return given


def _tell_limits(wanted: Mapping[str, float], given: Mapping[str, float], step: int) -> None:
    """Say which linears can't have what depth and kind ask for, and by how much at worst."""
    far = {name: abs(wanted[name] - given[name]) for name in wanted}
    limited = [name for name, distance in far.items() if distance >= step]
    if limited:
        worst = max(limited, key=far.get)
        logger.warning(
            "%d of %d linears can't have the rank that their depth and kind ask for, %s %.0f instead of %.0f; lower "
            "budget.depth_slope or bring budget.roles nearer to 1, or widen budget.low and budget.high",
            *(len(limited), len(wanted), worst, given[worst], wanted[worst]),
        )


def allocate_by_prior(
    shapes: Shapes, places: Mapping[str, Place], config: BudgetConfig
) -> dict[str, int]:
    """Ranks by depth and kind of linear.

    Args:
        shapes: layer name to (d_out, d_in).
        places: layer name to depth and role.
        config: bits, step, slope, weights of roles, limits.

    Raises:
        ValueError: the budget can't be met within the limits; by how much.
    """
    limits = rank_limits(shapes, config)
    return round_ranks(shapes, prior_ranks(shapes, places, config, limits), limits)


def allocate_by_loss(
    shapes: Shapes,
    places: Mapping[str, Place],
    responses: Mapping[str, Response],
    config: BudgetConfig,
) -> dict[str, int]:
    """Ranks by measured loss and depth; arguments and errors as :func:`allocate_by_prior`."""
    ramped = {
        name: Response(
            response.level + math.log(depth_multiplier(places[name], config.depth_slope)),
            response.exponent,
        )
        for name, response in responses.items()
    }
    return spend_by_loss(shapes, ramped, rank_limits(shapes, config))


def spend_by_loss(
    shapes: Shapes, responses: Mapping[str, Response], limits: RankLimits
) -> dict[str, int]:
    """From the smallest ranks up, each step where the loss falls most per bit."""
    ranks = dict(limits.least)

    def least_gain_last(name: str) -> float:
        loss, rank = responses[name].loss, ranks[name]
        gain = loss(rank) - loss(rank + limits.step)
        return -gain / step_bits(shapes[name], rank, limits.step)

    return hand_out(shapes, ranks, limits, used_bits(shapes, ranks), least_gain_last)


def fit_response(errors: Mapping[int, float], loss: float, rank: int) -> Response:
    """Response of a linear, from its errors at some ranks and its loss at one.

    The loss is taken to follow the error: log error = const - b log r by least squares, b kept within
    ``EXPONENTS``; one rank alone gives b = 1.

    Args:
        errors: rank to error, in any unit; all above 0.
        loss: at ``rank``; in nats per token.
        rank: of that loss.
    """
    points = [(math.log(r), math.log(max(e, 1e-30))) for r, e in errors.items()]
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else -1.0
    exponent = min(max(-slope, EXPONENTS[0]), EXPONENTS[1])
    return Response(math.log(max(loss, 1e-12)) + exponent * math.log(rank), exponent)
