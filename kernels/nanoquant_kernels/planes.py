"""Activations in plane order, which is what lets a GPU read the stored signs as they are.

A stored row of signs, read as little-endian 16-bit words, holds column 16 w + j in bit j of word w. Let the
activations change places instead of the signs: in plane order element 16 w + j of x stands at j P + w, where
P = ceil(K / 16) is the number of words of a row. Then bit j of every word belongs to plane j, a run of P neighbours:
one shift turns whole registers of words into signs for x as it lies in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanoquant_kernels.layout import ALIGNMENT

PLANES = 16


def words_of(columns: int) -> int:
    """Words P of a row of ``columns`` signs."""
    return -(-columns // PLANES)


def to_planes(x: Tensor, words: int | None = None) -> Tensor:
    """Bring (..., K) into plane order, (..., 16 P) for P = ``words`` or what K needs; columns from K on are 0."""
    padded = F.pad(x, (0, PLANES * (words or words_of(x.shape[-1])) - x.shape[-1]))
    return padded.unflatten(-1, (-1, PLANES)).mT.flatten(-2)


def from_planes(x: Tensor, columns: int) -> Tensor:
    """Undo :func:`to_planes`: (..., 16 P) to (..., K)."""
    return x.unflatten(-1, (PLANES, -1)).mT.flatten(-2)[..., :columns]


def as_words(signs: Tensor, dtype: torch.dtype = torch.int16) -> Tensor:
    """Packed rows uint8 (R, B) as words (R, P); without a copy where rows are a whole number of words apart.

    Rows may be padded, as :func:`nanoquant_kernels.layout.align_rows` makes them: then P counts the padding, whose
    bits mean nothing, so activations must be 0 there. The distance of rows is P in any case.
    """
    R, width = signs.shape
    size, stride = dtype.itemsize, signs.stride(0) if R > 1 else width
    end = signs.storage_offset() + R * stride
    padded = width <= stride < width + ALIGNMENT and signs.stride(1) == 1
    if (
        stride % size
        or signs.data_ptr() % size
        or not padded
        or end > signs.untyped_storage().nbytes()
    ):
        signs, stride = F.pad(signs, (0, -width % size)).contiguous(), width + -width % size
    return signs.as_strided((R, stride), (stride, 1)).view(dtype)
