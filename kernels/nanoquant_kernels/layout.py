"""The stored layout of a sign matrix: the only place that knows the order of bits.

A row of K signs takes ceil(K / 8) bytes. Bit j (value 2**j) of byte k is column 8 k + j, and a set
bit means -1:

    signs  + - + +  - - + +   -        ->  bytes 0b00110010, 0b00000001
    column 0 1 2 3  4 5 6 7   8

Bits past column K - 1 are 0. The same bytes read as little-endian 32-bit words hold column 32 w + j
in bit j of word w. U (d_out, r) is stored by rows; V (d_in, r) is stored transposed, as r rows of
d_in signs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_width(columns: int) -> int:
    """Bytes of one packed row of ``columns`` signs."""
    return (columns + 7) // 8


ALIGNMENT = 16
"""Bytes; what a GPU loads at once."""


def align_rows(packed: Tensor) -> Tensor:
    """The same rows uint8 (R, B) a multiple of ``ALIGNMENT`` bytes apart: a view of a padded copy."""
    R, width = packed.shape
    if packed.stride(0) % ALIGNMENT == 0 and packed.stride(1) == 1:
        return packed
    padded = packed.new_zeros(R, width + -width % ALIGNMENT)
    padded[:, :width] = packed
    return padded[:, :width]


def pack_signs(signs: Tensor) -> Tensor:
    """Pack the signs of ``signs`` along its last dimension.

    Args:
        signs: (..., K), any real dtype; entries below zero become set bits, all others (0 and -0.0
            too) clear ones; for a bool tensor True is a set bit, so it means -1.

    Returns:
        uint8 (..., ceil(K / 8)).
    """
    bits = signs if signs.dtype == torch.bool else signs < 0
    bits = F.pad(bits.to(torch.uint8), (0, -signs.shape[-1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return (bits.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Unpack rows of bytes to -1 and +1 by a table, several times faster than by shifts.

    Args:
        packed: uint8 (R, ceil(columns / 8)), as made by :func:`pack_signs`.
        columns: K, the signs in a row.
        dtype: dtype of the result.

    Returns:
        (R, columns) in ``dtype``.
    """
    byte = torch.arange(256, device=packed.device).unsqueeze(-1)
    bits = (byte >> torch.arange(8, device=packed.device)) & 1
    table = (1 - 2 * bits).to(dtype)  # (256, 8)
    rows, width = packed.shape
    signs = table.index_select(0, packed.reshape(-1).int())  # (R * width, 8)
    return signs.view(rows, width * 8)[:, :columns]
