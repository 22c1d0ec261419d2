"""Signs as 32-bit words, as the published code and its llama.cpp port store them.

Bit j of word w of a row is column 32 w + j, set for -1, and bits past the last column are clear. So the bytes are those
of :mod:`nanoquant_kernels.layout`, with rows filled up to whole words.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanoquant_kernels import packed_width

WORD = 32
"""Signs in a word."""


def to_words(packed: Tensor, columns: int) -> Tensor:
    """Words int32 (n, ceil(columns / 32)) of packed rows uint8 (n, ceil(columns / 8))."""
    _check_host()
    width = words_of(columns) * WORD // 8
    return F.pad(packed, (0, width - packed.shape[1])).contiguous().view(torch.int32)


def from_words(words: Any, columns: int, name: str) -> Tensor:  # noqa: ANN401
    """Packed rows uint8 (n, ceil(columns / 8)) of words int32 (n, ceil(columns / 32)).

    Args:
        words: as :func:`to_words` gives them.
        columns: signs of a row.
        name: for messages.

    Raises:
        ValueError: dtype or shape are others, or a bit past the last column is set.
    """
    _check_host()
    if not isinstance(words, Tensor):
        raise ValueError(f"{name} must be int32 words, got {type(words).__name__}")
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != words_of(columns):
        raise ValueError(
            f"{name} must be int32 words (rows, {words_of(columns)}) for {columns} columns, got {words.dtype} "
            f"{tuple(words.shape)}"
        )
    found = words.contiguous().view(torch.uint8)
    width, rest = packed_width(columns), columns % 8
    beyond = found[:, width:].any() or (rest and (found[:, width - 1] >> rest).any())
    if beyond:
        raise ValueError(
            f"{name} has bits set past column {columns - 1}, so its shape or the order of its bits is another one"
        )
    return found[:, :width].contiguous()


def words_of(columns: int) -> int:
    """Words of a row."""
    return -(-columns // WORD)


def _check_host() -> None:
    if sys.byteorder != "little":
        raise ValueError("words are read and written on little-endian machines alone")
