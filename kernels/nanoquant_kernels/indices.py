"""The stored layout of codebook indices of 4, 6, 8, 10 or 12 bits: the only place that knows their order.

A row of n indices is one string of n * width bits, lowest bit first: bit b of the row is bit b % 8 (value 2**(b % 8))
of byte b // 8, and bit j of index i is bit i * width + j of the row. Each row starts at a byte; bits past the last
index are 0. For width 6:

    indices  0b000001 0b000010 0b000011 0b000100  ->  bytes 0b10000001 0b00110000 0b00010000
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (4, 6, 8, 10, 12)
"""Bits of an index; four of any of them are a whole number of bytes."""
AT_ONCE = 4


def check_width(width: int) -> None:
    """Raise ValueError for a width that indices can't have."""
    if width not in WIDTHS:
        raise ValueError(
            f"indices have {', '.join(map(str, WIDTHS))} bits, got {width}; choose one of these"
        )


def index_bytes(count: int, width: int) -> int:
    """Bytes of one packed row of ``count`` indices of ``width`` bits."""
    check_width(width)
    return (count * width + 7) // 8


def pack_indices(indices: Tensor, width: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        indices: (..., n), any integer dtype, from 0 to 2**width - 1.
        width: bits of an index.

    Returns:
        uint8 (..., ceil(n * width / 8)).

    Raises:
        ValueError: another width, or an index out of its range.
    """
    size = index_bytes(indices.shape[-1], width)
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < 2**width):
        raise ValueError(
            f"indices of {width} bits lie in 0..{2**width - 1}, got {int(indices.min())}.."
            f"{int(indices.max())}; pack them with a larger width"
        )
    if width == 8:
        return indices.to(torch.uint8)
    padded = F.pad(indices.long(), (0, -indices.shape[-1] % AT_ONCE)).unflatten(-1, (-1, AT_ONCE))
    words = (padded << _shifts(AT_ONCE, width, indices)).sum(-1, keepdim=True)  # 4 width bits each
    packed = words >> _shifts(AT_ONCE * width // 8, 8, indices) & 255
    return packed.to(torch.uint8).flatten(-2)[..., :size].contiguous()


def unpack_indices(packed: Tensor, count: int, width: int) -> Tensor:
    """Undo :func:`pack_indices`: uint8 (..., ceil(count * width / 8)) to int32 (..., count).

    Raises:
        ValueError: another width, or rows that do not hold so many indices.
    """
    size = index_bytes(count, width)
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise ValueError(
            f"{count} indices of {width} bits take rows of {size} bytes (uint8), got "
            f"{packed.dtype} of shape {tuple(packed.shape)}"
        )
    if width == 8:
        return packed.int()
    word = AT_ONCE * width // 8  # bytes
    padded = F.pad(packed, (0, -size % word)).unflatten(-1, (-1, word)).long()
    words = (padded << _shifts(word, 8, packed)).sum(-1, keepdim=True)
    indices = words >> _shifts(AT_ONCE, width, packed) & (2**width - 1)
    return indices.int().flatten(-2)[..., :count]


def _shifts(count: int, step: int, like: Tensor) -> Tensor:
    """0, step, 2 step, ... on the device of ``like``."""
    return torch.arange(0, count * step, step, device=like.device)
