"""KMeansInitializer: from a weight and its importances to codebooks, indices and row scales.

Minimises sum o_i i_j (W - A)_ij^2 by alternating least squares: start from k-means of the rows divided by their
weighted root mean squares and then of what is left; after that, in turn, indices, codebooks and scales. Every slab of
rows is a problem of its own. Letters and shapes are those of :mod:`nanoquant.codebooks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanoquant.codebooks import ProductFactors
from nanoquant.importance import Importance, check_inputs
from nanoquant.kmeans import LloydConfig, Points, assign, kmeans, nearest, update
from nanoquant.product_budget import ProductShape

EXHAUSTIVE = 2**8
"""Pairs of entries up to which both stages are searched together."""


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """How codebooks, indices and scales are found."""

    lloyd: LloydConfig = field(default_factory=LloydConfig)
    """The k-means of each stage, on a sample."""
    rounds: int = 3
    """Alternating rounds over all points after it: indices, codebooks, scales; at least 1."""

    beam: int = 8
    """Entries of the first stage that are tried with all of the second, where there are too many pairs to try all."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.beam < 1:
            raise ValueError(
                f"rounds and beam must be at least 1, got {self.rounds} and {self.beam}"
            )


class KMeansInitializer(nn.Module):
    """Quantize weights to codebooks that minimise the importance-weighted error.

    Example::

        factors = KMeansInitializer(KMeansConfig())(weight, importance, ProductShape(8, (8,)))

    Args:
        config: of the k-means, and the rounds after it.
    """

    def __init__(self, config: KMeansConfig | None = None) -> None:
        super().__init__()
        self.config = config or KMeansConfig()

    @torch.no_grad()
    def forward(
        self,
        weight: Tensor,
        importance: Importance,
        shape: ProductShape,
        generator: torch.Generator | None = None,
    ) -> ProductFactors:
        """Quantize one weight, or a batch of equal shape, one slab at a time.

        Args:
            weight: W (..., d_out, d_in).
            importance: second moments, input (..., d_in) and output (..., d_out), all above 0.
            shape: group, widths and slabs.
            generator: of samples and starts, on the CPU; seed 0 when absent.

        Returns:
            Float32 codebooks and scales on the device of ``weight``.

        Raises:
            ValueError: shapes disagree, or a weight or importance is not finite and positive.
        """
        shape.check(*weight.shape[-2:])
        W, i, o = _as_batch(*check_inputs(weight, importance))
        generator = generator or torch.Generator().manual_seed(0)
        slabs = [
            self.slab(W_slab, i_b, o_slab, shape, generator)
            for W_b, i_b, o_b in zip(W, i, o, strict=True)
            for W_slab, o_slab in zip(W_b.chunk(shape.slabs), o_b.chunk(shape.slabs), strict=True)
        ]
        books, indices, scales = zip(*slabs, strict=True)
        lead, (d_out, d_in) = weight.shape[:-2], weight.shape[-2:]
        return ProductFactors(
            tuple(
                torch.stack(C).view(*lead, shape.slabs, *C[0].shape)
                for C in zip(*books, strict=True)
            ),
            tuple(torch.cat(k).view(*lead, d_out, -1) for k in zip(*indices, strict=True)),
            torch.cat(scales).view(*lead, d_out),
            d_in,
        )

    def slab(
        self, W: Tensor, i: Tensor, o: Tensor, shape: ProductShape, generator: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Codebooks (K, g) and indices (n, G) of each stage, and scales (n,), of W (n, d_in)."""
        W, i = grouped(W, shape.group), grouped(i, shape.group)
        scale = (torch.einsum("ngt,gt->n", W.square(), i) / i.sum()).sqrt()
        points = scaled_points(W, i, o, scale)
        books: list[Tensor] = []
        indices: list[Tensor] = []
        left = points
        for entries in shape.entries:
            if books:
                indices.append(assign(left, books[-1])[0])
                left = left._replace(x=remainder(left.x, books[-1:], indices[-1:]))
            books.append(kmeans(left, entries, generator, self.config.lloyd))
        indices.append(torch.zeros(W.shape[:2], dtype=torch.int16, device=W.device))
        del left
        for _ in range(self.config.rounds):
            improve(points, books, indices, self.config.beam)
            scale = refit_scales(W, i, books, indices, scale)
            points = scaled_points(W, i, o, scale)
        return books, indices, scale


@torch.no_grad()
def reassigned(
    factors: ProductFactors, weight: Tensor, importance: Importance, beam: int
) -> ProductFactors:
    """The factors of one matrix with the indices that are nearest to ``weight`` (d_out, d_in), all else as it is.

    Raises:
        ValueError: as of :class:`KMeansInitializer`.
    """
    shape = factors.shape
    shape.check(*weight.shape)
    W, i, o = check_inputs(weight, importance)
    W, i = grouped(W, shape.group), grouped(i, shape.group)
    points = scaled_points(W, i, o, factors.scale)
    found = []
    for slab in range(shape.slabs):
        books = [C[slab] for C in factors.codebooks]
        indices = [k.chunk(shape.slabs)[slab] for k in factors.indices]
        part = Points(*(tensor.chunk(shape.slabs)[slab] for tensor in points))
        found.append(choose(part, books, indices, beam)[0])
    indices = tuple(torch.cat(stage) for stage in zip(*found, strict=True))
    return ProductFactors(factors.codebooks, indices, factors.scale, factors.d_in)


def grouped(x: Tensor, group: int) -> Tensor:
    """Cut (..., d_in) into groups (..., G, g), the last one filled up with zeros."""
    padding = -x.shape[-1] % group
    return (F.pad(x, (0, padding)) if padding else x).unflatten(-1, (-1, group))


def scaled_points(W: Tensor, i: Tensor, o: Tensor, scale: Tensor) -> Points:
    """Groups W (n, G, g) over their row's scale; masses make the error that of W, up to a factor.

    Args:
        W: (n, G, g).
        i: input importances (G, g).
        o: output importances (n,).
        scale: (n,); a row of scale 0 weighs nothing.
    """
    x = W / torch.where(scale != 0, scale, 1.0).view(-1, 1, 1)
    size = scale / scale.abs().max().clamp_min(
        torch.finfo(scale.dtype).tiny
    )  # squares can't underflow
    return Points(x, i.expand_as(x), (o * size.square()).unsqueeze(-1).expand(x.shape[:2]))


def remainder(x: Tensor, books: list[Tensor], indices: list[Tensor]) -> Tensor:
    """What the stages leave of x (n, G, g)."""
    for C, k in zip(books, indices, strict=True):
        x = F.embedding(k.int(), C).neg_().add_(x)
    return x


def improve(points: Points, books: list[Tensor], indices: list[Tensor], beam: int) -> None:
    """One round in place: the nearest entries of all stages, then of each stage the means of what chose them."""
    indices[:], cost = choose(points, books, indices, beam)
    for stage in range(len(books)):
        others = [part[:stage] + part[stage + 1 :] for part in (books, indices)]
        left = points._replace(x=remainder(points.x, *others))
        books[stage] = update(left, indices[stage], books[stage], cost)


def choose(
    points: Points, books: list[Tensor], indices: list[Tensor], beam: int
) -> tuple[list[Tensor], Tensor]:
    """Indices (n, G) of each stage that are near the points, and their cost (n, G), see :func:`assign_pairs`."""
    if len(books) == 1:
        index, cost = assign(points, books[0])
        return [index], cost
    return assign_pairs(points, books, indices, beam)


def assign_pairs(
    points: Points, books: list[Tensor], indices: list[Tensor], beam: int
) -> tuple[list[Tensor], Tensor]:
    """Pairs of entries near each point, and their cost (n, G), never above that of ``indices``.

    Few pairs are searched as one codebook of their sums; of many, those whose first entry is among the ``beam``
    nearest.
    """
    first, second = books
    if len(first) * len(second) <= EXHAUSTIVE:
        sums = (first.unsqueeze(1) + second).flatten(0, 1)  # (K1 K2, g)
        pair, cost = assign(points, sums)
        return [pair // len(second), pair % len(second)], cost
    best = list(indices)
    left = remainder(points.x, books, indices).square_()
    least = left.mul_(points.weights).sum(-1)
    del left
    for candidate in nearest(points, first, beam).unbind(-1):
        left = points._replace(x=remainder(points.x, [first], [candidate]))
        index, cost = assign(left, second)
        better = cost < least
        least = torch.where(better, cost, least)
        pairs = zip((candidate, index), best, strict=True)
        best = [torch.where(better, new, old) for new, old in pairs]
    return best, least


def refit_scales(
    W: Tensor, i: Tensor, books: list[Tensor], indices: list[Tensor], scale: Tensor
) -> Tensor:
    """Scales (n,) of least weighted error for what the stages look up; the old one where that is zero."""
    scale = scale.clone()
    for rows, (w, weight, _) in Points(W, i.expand_as(W), scale).chunks(4 * W.shape[-1]):
        q = sum(F.embedding(k[rows].int(), C) for C, k in zip(books, indices, strict=True))
        above, below = (weight * q * w).sum((1, 2)), (weight * q.square()).sum((1, 2))
        scale[rows] = torch.where(below > 0, above / below.clamp_min(1e-30), scale[rows])
    return scale


def _as_batch(W: Tensor, i: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (B, d_out, d_in), i (B, d_in) and o (B, d_out) of any leading dimensions, none included."""
    W = W.flatten(0, -3) if W.dim() > 2 else W.unsqueeze(0)
    return W, *(part.expand(*W.shape[:-2], -1).reshape(-1, part.shape[-1]) for part in (i, o))
