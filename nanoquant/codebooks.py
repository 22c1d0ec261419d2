"""ProductFactors: a weight as row scales times groups that are looked up in codebooks.

Row i of W (d_out, d_in), divided by its scale, is cut into G = ceil(d_in / g) groups of g consecutive inputs; group
(i, j) is C1[k1[i, j]], plus C2[k2[i, j]] where there is a second, residual stage. The last group is filled up with
columns of zeros, which count as stored and weigh nothing. R slabs of rows have codebooks of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanoquant.product_budget import ProductShape, product_bits


@dataclass(frozen=True)
class ProductFactors:
    """W ~ scale * (C1[k1] + C2[k2]), or a batch of them along a leading dimension of every tensor."""

    codebooks: tuple[Tensor, ...]
    """Of each stage, float32 (..., R, K, g)."""
    indices: tuple[Tensor, ...]
    """Of each stage, int16 (..., d_out, G)."""
    scale: Tensor
    """Of each row, float32 (..., d_out)."""
    d_in: int
    """Columns of W."""

    @property
    def shape(self) -> ProductShape:
        """Group, widths and slabs."""
        return ProductShape.of(self.codebooks)

    @property
    def bits(self) -> int:
        """Stored bits of one matrix."""
        return product_bits(self.scale.shape[-1], self.d_in, self.shape)

    def dense(self) -> Tensor:
        """Reconstruct W, (..., d_out, d_in), float32."""
        if self.scale.dim() > 1:
            return torch.stack([part.dense() for part in self.unbind()])
        total = sum(look_up(C, k) for C, k in zip(self.codebooks, self.indices, strict=True))
        return self.scale.unsqueeze(-1) * total.flatten(-2)[:, : self.d_in]

    def normalized(self) -> ProductFactors:
        """Move the size of each slab's first codebook into its scales, so that one rate suits every layer."""
        rms = self.codebooks[0].square().mean(dim=(-2, -1), keepdim=True).sqrt()  # (..., R, 1, 1)
        rms = torch.where(rms > 0, rms, 1.0)
        rows = rms.flatten(-3).repeat_interleave(self.scale.shape[-1] // rms.shape[-3], -1)
        books = tuple(C / rms for C in self.codebooks)
        return ProductFactors(books, self.indices, self.scale * rows, self.d_in)

    def unbind(self) -> list[ProductFactors]:
        """Split a batch of factors along its first dimension."""
        return [
            ProductFactors(
                tuple(C[b] for C in self.codebooks),
                tuple(k[b] for k in self.indices),
                self.scale[b],
                self.d_in,
            )
            for b in range(len(self.scale))
        ]


def look_up(codebook: Tensor, index: Tensor) -> Tensor:
    """Entries (d_out, G, g) of a codebook (R, K, g) by their numbers (d_out, G), one range of rows a slab."""
    (R, K, g), d_out = codebook.shape, len(index)
    first = K * torch.arange(R, device=index.device).repeat_interleave(d_out // R)  # (d_out,)
    return F.embedding(index.long() + first.unsqueeze(-1), codebook.reshape(R * K, g))
