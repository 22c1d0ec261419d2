"""Outputs of several linears in one tensor, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor


def starts_of(outs: Sequence[int]) -> list[int]:
    """Where each member's output starts, a token, aligned to 16 bytes in 16 bits; at last the whole length."""
    return [0, *itertools.accumulate(d_out + -d_out % 8 for d_out in outs)]


def parts(flat: Tensor, x: Tensor, outs: Sequence[int]) -> list[Tensor]:
    """The members' outputs (..., d_out) in the tensor that holds them one after the other."""
    lead, tokens = x.shape[:-1], x.numel() // x.shape[-1]
    return [
        flat[start * tokens :][: d_out * tokens].view(*lead, d_out)
        for start, d_out in zip(starts_of(outs), outs, strict=False)
    ]
