"""Bits of product-quantized linears: the accounting of one layer, stated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanoquant.budget import SCALE_BITS
from nanoquant_kernels.indices import check_width, index_bytes

ENTRY_BITS = 16
"""Bits of one stored number of a codebook, a bfloat16."""


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


def product_body_bits(
    shapes: Mapping[str, tuple[int, int]], chosen: Mapping[str, ProductShape]
) -> float:
    """Bits per weight of linears by name, (d_out, d_in) each, with these shapes of codebooks together."""
    bits = sum(product_bits(*shapes[name], shape) for name, shape in chosen.items())
    return bits / sum(shapes[name][0] * shapes[name][1] for name in chosen)
