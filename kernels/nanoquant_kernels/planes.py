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

PLANES = 16


def words_of(columns: int) -> int:
    """Words P of a row of ``columns`` signs."""
    return -(-columns // PLANES)


def to_planes(x: Tensor) -> Tensor:
    """Bring (..., K) into plane order, (..., 16 P); columns from K on are 0."""
    padded = F.pad(x, (0, PLANES * words_of(x.shape[-1]) - x.shape[-1]))
    return padded.unflatten(-1, (-1, PLANES)).mT.flatten(-2)


def from_planes(x: Tensor, columns: int) -> Tensor:
    """Undo :func:`to_planes`: (..., 16 P) to (..., K)."""
    return x.unflatten(-1, (PLANES, -1)).mT.flatten(-2)[..., :columns]


def as_words(signs: Tensor) -> Tensor:
    """Packed rows uint8 (R, B) as int16 (R, ceil(B / 2)); without a copy where B is even."""
    if signs.shape[-1] % 2:
        signs = F.pad(signs, (0, 1))
    return signs.contiguous().view(torch.int16)
