"""Weighted k-means over short groups of weights: k-means++ starts on a sample, Lloyd's iteration, bounded memory.

Minimises the sum over points of mass * sum_t w_t (x_t - c_t)^2 over K centroids c, where every coordinate has its own
weight w; faiss knows no weights at all and scikit-learn's MiniBatchKMeans one a point, which is why neither serves.
Shapes: n rows of G points of g coordinates; weights and masses may be expanded views, which take no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**23}
"""Bytes of the largest temporary matrix, scores of points against all centroids: on a CPU what its cache holds."""
LARGE_CHUNK_BYTES = 2**27
"""The same on other devices."""
START_SAMPLE = 16
"""Points an entry among which k-means++ chooses."""


@dataclass(frozen=True, kw_only=True)
class LloydConfig:
    """How long Lloyd's iteration runs, and on how many points."""

    iterations: int = 30
    """Iterations at most."""
    tolerance: float = 1e-3
    """Relative gain of an iteration below which it ends."""
    sample: int = 256
    """Points an entry on which it runs, drawn at random where there are more."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.sample < 1:
            raise ValueError(
                f"iterations and sample must be at least 1, got {self.iterations} and {self.sample}"
            )
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in 0..1, got {self.tolerance}")


class Points(NamedTuple):
    """What is clustered."""

    x: Tensor
    """(n, G, g), float32."""
    weights: Tensor
    """(n, G, g), of the coordinates, at least 0."""
    mass: Tensor
    """(n, G), of the points, at least 0."""

    def chunks(self, width: int) -> Iterator[tuple[slice, Points]]:
        """Ranges of rows so that ``width`` float32 numbers a point fit into the chunk."""
        size = CHUNK_BYTES.get(self.x.device.type, LARGE_CHUNK_BYTES)
        step = max(1, size // (4 * width * self.x.shape[1]))
        for first in range(0, len(self.x), step):
            rows = slice(first, first + step)
            yield rows, Points(*(part[rows] for part in self))

    def sampled(self, count: int, generator: torch.Generator) -> Points:
        """So many points at random, as (count, 1, g); all of them where there are no more."""
        n, G, g = self.x.shape
        if n * G <= count:
            flat = (self.x.reshape(-1, 1, g), self.weights.reshape(-1, 1, g))
            return Points(*flat, self.mass.reshape(-1, 1))
        drawn = torch.randint(n * G, (count,), generator=generator).to(self.x.device)
        at = drawn // G, drawn % G
        return Points(*(part[at].unsqueeze(1) for part in self))


def kmeans(points: Points, entries: int, generator: torch.Generator, config: LloydConfig) -> Tensor:
    """Centroids (K, g) of the points; the same ones for the same state of the generator.

    Args:
        points: what is clustered.
        entries: K.
        generator: of the samples and the starts, on the CPU.
        config: of Lloyd's iteration.
    """
    start = points.sampled(START_SAMPLE * entries, generator)
    return lloyd(
        points.sampled(config.sample * entries, generator),
        plus_plus(start, entries, generator),
        config,
    )


def plus_plus(points: Points, entries: int, generator: torch.Generator) -> Tensor:
    """K starts (K, g), each drawn with the probability of its cost against those before it (k-means++)."""
    x, weights, mass = points.x.flatten(0, 1), points.weights.flatten(0, 1), points.mass.flatten()
    draws = torch.rand(entries, generator=generator, dtype=torch.float64).to(x.device)
    cost = mass * (weights * x.square()).sum(-1)  # against 0, the best guess before there is any
    starts = x.new_empty(entries, x.shape[-1])
    for k in range(entries):
        total = cost.double().cumsum(0)
        place = torch.searchsorted(total, draws[k : k + 1] * total[-1], right=True)
        starts[k] = x[place.clamp(max=len(x) - 1)]
        now = mass * (weights * (x - starts[k]).square()).sum(-1)
        cost = now if k == 0 else torch.minimum(cost, now)
    return starts


def lloyd(points: Points, centroids: Tensor, config: LloydConfig) -> Tensor:
    """Lloyd's iteration from ``centroids`` (K, g) until the gain is below the tolerance."""
    before = float("inf")
    for _ in range(config.iterations):
        index, cost = assign(points, centroids)
        centroids = update(points, index, centroids, cost)
        now = float((points.mass * cost).sum(dtype=torch.float64))
        if before - now <= config.tolerance * now:
            break
        before = now
    return centroids


def assign(points: Points, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of every point, int16 (n, G), and its cost sum_t w_t (x_t - c_t)^2, (n, G)."""
    index = points.x.new_empty(points.x.shape[:2], dtype=torch.int16)
    cost = points.x.new_empty(points.x.shape[:2])
    for rows, (x, w, _), scores in score(points, centroids):
        least, best = scores.min(1)
        index[rows] = best.view(len(x), -1)
        cost[rows] = (least.view(len(x), -1) + (w * x.square()).sum(-1)).clamp_min_(0)
    return index, cost


def nearest(points: Points, centroids: Tensor, count: int) -> Tensor:
    """The ``count`` nearest centroids of every point, int16 (n, G, count), or all where there are fewer."""
    count = min(count, len(centroids))
    index = points.x.new_empty((*points.x.shape[:2], count), dtype=torch.int16)
    for rows, _, scores in score(points, centroids):
        index[rows] = scores.topk(count, largest=False).indices.view(-1, index.shape[1], count)
    return index


def score(points: Points, centroids: Tensor) -> Iterator[tuple[slice, Points, Tensor]]:
    """Costs of points against all centroids, without sum_t w_t x_t^2, a chunk of rows (c G, K) at a time.

    The square is multiplied out to one matrix product: [w x, w] times [-2 c, c^2].
    """
    right = torch.cat([-2 * centroids, centroids.square()], dim=1).T.contiguous()  # (2 g, K)
    for rows, chunk in points.chunks(len(centroids)):
        left = torch.cat([chunk.weights * chunk.x, chunk.weights], dim=-1).flatten(0, 1)
        yield rows, chunk, left @ right


def update(points: Points, index: Tensor, centroids: Tensor, cost: Tensor | None = None) -> Tensor:
    """Weighted means (K, g) of the points of each centroid.

    A coordinate without weight keeps its value. Centroids without any weight move to the points of the highest cost,
    where ``cost`` (n, G) is given.
    """
    K, g = centroids.shape
    above, below = (centroids.new_zeros(K, g, dtype=torch.float64) for _ in range(2))
    for rows, (x, w, mass) in points.chunks(4 * g):
        weight = (mass.unsqueeze(-1) * w).flatten(0, 1)
        at = index[rows].flatten().long()
        for total, part in ((above, weight * x.flatten(0, 1)), (below, weight)):
            total += torch.zeros_like(centroids).index_put_((at,), part, accumulate=True)
    means = torch.where(below > 0, above / below.clamp_min(1e-300), centroids.double()).float()
    if cost is not None:
        empty = (below.sum(-1) == 0).nonzero().flatten()
        worst = (points.mass * cost).flatten().topk(min(len(empty), cost.numel())).indices
        row, column = worst // cost.shape[1], worst % cost.shape[1]
        means[empty[: len(worst)]] = points.x[row, column]
    return means
