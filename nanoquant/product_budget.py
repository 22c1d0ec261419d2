"""Bits of product-quantized linears: the accounting of one layer, and a plan for those of a model.

The plan knows shapes alone: what it minimises is the error that Gaussian weights of variance 1 would have, so linears
of a model get about the same quality, and small ones smaller codebooks, because there these weigh more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nanoquant.budget import SCALE_BITS
from nanoquant_kernels.indices import check_width, index_bytes

ENTRY_BITS = 16
"""Bits of one stored number of a codebook, a bfloat16."""
Menu = Mapping[tuple[int, tuple[int, ...]], float]
"""(group, widths) to the share of the energy of Gaussian weights that is lost."""
MENU: Menu = {
    (32, (6,)): 0.820,
    (16, (4,)): 0.792,
    (32, (8,)): 0.737,
    (32, (6, 4)): 0.721,
    (16, (6,)): 0.676,
    (32, (6, 6)): 0.659,
    (8, (4,)): 0.610,
    (16, (4, 4)): 0.604,
    (32, (8, 6)): 0.590,
    (16, (8,)): 0.563,
    (32, (8, 8)): 0.528,
    (16, (6, 4)): 0.510,
    (16, (10,)): 0.454,
    (8, (6,)): 0.443,
    (16, (6, 6)): 0.430,
    (16, (8, 4)): 0.424,
    (16, (8, 6)): 0.358,
    (4, (4,)): 0.345,
    (8, (4, 4)): 0.337,
    (8, (8,)): 0.320,
    (16, (8, 8)): 0.296,
    (8, (6, 4)): 0.246,
    (8, (10,)): 0.222,
    (4, (6,)): 0.186,
    (8, (6, 6)): 0.178,
    (8, (8, 4)): 0.176,
    (8, (8, 6)): 0.128,
    (4, (4, 4)): 0.108,
    (4, (8,)): 0.0969,
    (8, (8, 8)): 0.0912,
    (4, (6, 4)): 0.0577,
    (4, (10,)): 0.0485,
    (4, (6, 6)): 0.0306,
    (2, (6,)): 0.0300,
    (4, (8, 8)): 0.0083,
    (2, (8,)): 0.0079,
    (2, (10,)): 0.0020,
}
"""What the planner chooses from, as measured on a matrix of 1024 x 1024 with the initializer's defaults."""
MOST_SLABS = 16
"""The planner gives a matrix this many codebooks at most, a power of two."""
POINTS_AN_ENTRY = 8
"""Groups that the planner wants for every entry of a codebook."""


@dataclass(frozen=True, order=True)
class ProductShape:
    """How a weight is cut into groups and looked up; ``str`` gives "8:8+4 x2"."""

    group: int
    """g, consecutive inputs that share an index."""
    widths: tuple[int, ...]
    """Bits of the index of each stage, one or two; a stage has 2**width entries."""
    slabs: int = 1
    """R, equal ranges of rows with codebooks of their own."""

    def __post_init__(self) -> None:
        if self.group < 1 or self.slabs < 1:
            raise ValueError(
                f"group and slabs must be at least 1, got {self.group} and {self.slabs}"
            )
        if not 1 <= len(self.widths) <= 2:
            raise ValueError(
                f"codebooks have one stage or a second, residual one, got widths {self.widths}"
            )
        for width in self.widths:
            check_width(width)

    def __str__(self) -> str:
        text = f"{self.group}:{'+'.join(map(str, self.widths))}"
        return text if self.slabs == 1 else f"{text} x{self.slabs}"

    @classmethod
    def of(cls, codebooks: Sequence[Tensor]) -> ProductShape:
        """That of the codebooks (..., R, K, g) of each stage."""
        slabs, _, group = codebooks[0].shape[-3:]
        return cls(group, tuple(C.shape[-2].bit_length() - 1 for C in codebooks), slabs)

    @property
    def entries(self) -> tuple[int, ...]:
        """Codebook entries K of each stage."""
        return tuple(2**width for width in self.widths)

    def groups(self, d_in: int) -> int:
        """Groups of a row; the last one may reach past column d_in."""
        return -(-d_in // self.group)

    def check(self, d_out: int, d_in: int, name: str = "a weight") -> None:
        """Raise ValueError, with ``name`` in it, where a weight of this shape can't be cut so."""
        if d_out % self.slabs:
            raise ValueError(
                f"{name} of shape ({d_out}, {d_in}) has rows that {self.slabs} slabs do not divide: take a divisor "
                f"of {d_out}"
            )
        groups = d_out // self.slabs * self.groups(d_in)
        most = max(self.entries)
        if most > groups:
            raise ValueError(
                f"{name} of shape ({d_out}, {d_in}) has {groups} groups of {self.group} a codebook, fewer than its "
                f"{most} entries: take smaller widths, smaller groups or fewer slabs than {self}"
            )


def product_bits(d_out: int, d_in: int, shape: ProductShape) -> int:
    """Stored bits of one layer: indices, rows of them in whole bytes, codebooks and scales."""
    indices = sum(8 * d_out * index_bytes(shape.groups(d_in), width) for width in shape.widths)
    codebooks = ENTRY_BITS * shape.slabs * shape.group * sum(shape.entries)
    return indices + codebooks + SCALE_BITS * d_out


@dataclass(frozen=True)
class Option:
    """A shape of codebooks for one layer."""

    bits: int
    """Stored bits."""
    loss: float
    """Expected squared error, in weights of variance 1."""
    shape: ProductShape


def options_of(d_out: int, d_in: int, menu: Menu = MENU) -> list[Option]:
    """What a layer can take of the menu, each with less loss than all cheaper ones, by rising bits.

    A codebook of K entries for few groups n fits them better: each stage loses 1 - 1.2 (K / n)^0.7 of what it loses on
    many, as measured for n / K from 16 to 128, within a tenth; for 8 two stages lose still less.
    """
    found = []
    for (group, widths), distortion in menu.items():
        for slabs in (2**k for k in range(MOST_SLABS.bit_length())):
            shape = ProductShape(group, widths, slabs)
            points = d_out // slabs * shape.groups(d_in)
            if d_out % slabs or points < POINTS_AN_ENTRY * max(shape.entries):
                break
            fitted = math.prod(1 - 1.2 * (K / points) ** 0.7 for K in shape.entries)
            loss = d_out * d_in * distortion * fitted
            found.append(Option(product_bits(d_out, d_in, shape), loss, shape))
    kept: list[Option] = []
    for option in sorted(found, key=lambda o: (o.bits, o.loss, o.shape)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def hull_of(options: list[Option]) -> list[Option]:
    """The options at which bits buy most: each step takes less loss a bit than the one before."""
    hull: list[Option] = []
    for option in options:
        while len(hull) > 1 and _gain(hull[-1], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(low: Option, high: Option) -> float:
    """Loss that a bit takes away between two options."""
    return (low.loss - high.loss) / (high.bits - low.bits)


def plan_product(
    shapes: Mapping[str, tuple[int, int]], bits: float, menu: Menu = MENU
) -> dict[str, ProductShape]:
    """Choose codebooks for every linear so that the model takes at most, and almost exactly, the asked bits.

    Every weight counts alike: linears go through the options that bits serve best in the order of what a bit gains
    over the whole model, and what is left then goes to the steps that gain most of those that fit. With some dozens of
    linears less than a thousandth of the bits stays unused; with three, a twentieth.

    Args:
        shapes: layer name to (d_out, d_in).
        bits: per weight over all layers.
        menu: (group, widths) to distortion.

    Returns:
        Layer name to shape; the same for the same input.

    Raises:
        ValueError: a layer is too small for the menu, or the budget is below or above what it can meet.
    """
    options = {size: options_of(*size, menu) for size in set(shapes.values())}
    for name, size in shapes.items():
        if not options[size]:
            raise ValueError(
                f"{name} of shape {size} has too few groups for every codebook of the menu (the smallest has "
                f"{min(2 ** min(widths) for _, widths in menu)} entries): leave it out"
            )
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    few, many = (sum(options[size][end].bits for size in shapes.values()) for end in (0, -1))
    if not few <= bits * weights <= many:
        nearest = few if bits * weights < few else many
        raise ValueError(
            f"bits={bits} can't be met with these shapes: codebooks take {few / weights:.4f} to {many / weights:.4f} "
            f"bits per weight; the nearest that can is {nearest / weights:.4f}"
        )
    budget = int(bits * weights)
    budget -= budget / weights > bits  # the product may be rounded across a whole number
    chosen = {name: options[size][0] for name, size in shapes.items()}
    left = _climb(shapes, options, chosen, budget - few)
    _fill(shapes, options, chosen, left)
    return {name: option.shape for name, option in chosen.items()}


def _climb(
    shapes: Mapping[str, tuple[int, int]],
    options: Mapping[tuple[int, int], list[Option]],
    chosen: dict[str, Option],
    left: int,
) -> int:
    """Go up the hulls in the order of gain until a step does not fit; returns the bits that are left."""
    hulls = {size: hull_of(found) for size, found in options.items()}
    steps = [
        (-_gain(low, high), order, name, high, high.bits - low.bits)
        for order, (name, size) in enumerate(shapes.items())
        for low, high in itertools.pairwise(hulls[size])
    ]
    for _, _, name, option, cost in sorted(steps, key=lambda step: step[:2]):
        if cost > left:
            break
        chosen[name], left = option, left - cost
    return left


def _fill(
    shapes: Mapping[str, tuple[int, int]],
    options: Mapping[tuple[int, int], list[Option]],
    chosen: dict[str, Option],
    left: int,
) -> None:
    """Take the step of the largest gain among those that fit, until none does."""
    while True:
        kinds = {(shapes[name], option): name for name, option in reversed(chosen.items())}
        steps = [
            (now.loss - option.loss, option.bits - now.bits, name, option)
            for (size, now), name in kinds.items()
            for option in options[size]
            if now.bits < option.bits <= now.bits + left and option.loss < now.loss
        ]
        if not steps:
            return
        _, cost, name, option = max(steps, key=lambda step: step[:2])
        chosen[name], left = option, left - cost
