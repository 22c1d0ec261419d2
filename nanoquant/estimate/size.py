"""Ranks and bytes of a checkpoint: exact where ranks follow from shapes, within a step of one where losses choose."""

from __future__ import annotations

from dataclasses import dataclass

from nanoquant.allocation import allocate_by_prior
from nanoquant.budget import RankLimits, Shapes, rank_limits, used_bits
from nanoquant.config import NanoQuantConfig
from nanoquant.estimate.files import WeightFiles, weight_files
from nanoquant.estimate.subject import Subject
from nanoquant.methods import Sizes, method_of
from nanoquant.roles import layer_places

DIGITS = 16
"""Most bytes by which the header's numbers of a linear change with its rank."""


@dataclass(frozen=True)
class Size:
    """What a checkpoint takes under one configuration."""

    config: NanoQuantConfig
    """Its bits and the storage of the embedding are numbers."""
    given: Sizes
    """Rank of each linear, or its codebooks; ranks of equal bits where losses choose."""
    files: WeightFiles
    """Files at these ranks."""
    least: int
    """Fewest bytes of the weight files."""
    most: int
    """Most bytes of the weight files; both are those of ``files`` where ranks are certain."""

    @property
    def exact(self) -> bool:
        """Whether ranks, and so every byte, are certain."""
        return self.least == self.most


def size_of(subject: Subject, config: NanoQuantConfig) -> Size:
    """Ranks and files of a configuration whose budget is in bits.

    Raises:
        ValueError: nothing can meet them.
    """
    shapes, budget = subject.shapes, config.budget
    if budget.allocation == "prior":
        ranks = allocate_by_prior(shapes, layer_places(subject.decoder, subject.chosen), budget)
    else:
        ranks = method_of(config).plan(shapes, config)
    files = weight_files(subject.model, ranks, config.embedding)
    size = files.weight_bytes
    if budget.allocation != "measured":
        return Size(config, ranks, files, size, size)
    below, above = _room(shapes, ranks, rank_limits(shapes, budget))
    return Size(config, ranks, files, size - below, size + above)


def _room(shapes: Shapes, ranks: dict[str, int], limits: RankLimits) -> tuple[int, int]:
    """Bytes that other ranks may take less and more: they end within a step of the budget, and never beyond it."""
    step = max(
        d_out * -(-limits.step // 8) + limits.step * -(-d_in // 8)
        for d_out, d_in in shapes.values()
    )
    left = (limits.budget - used_bits(shapes, ranks)) // 8
    header = DIGITS * len(shapes)
    return max(0, step - left) + header, left + header
