"""The product with a packed weight and 8-bit activations in plain PyTorch: the truth of the int8 kernels.

The inputs of both stages, s2 * x and the latent, are rounded to q in -127 ... 127 with a scale for each of up to 64
groups of columns of a token: column k belongs to group 8 (k / 32 mod 8) + k mod 8. These are the columns that end in
the same lane of the same register while packed signs are read as they are stored, so many scales cost no time, and
more scales mean less error: on the demo model a third of what one scale a token gives.

Shapes as in :mod:`nanoquant_kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanoquant_kernels.layout import unpack_signs

GROUPS = 64
LEAST = 2.0**-120
"""Groups whose largest magnitude is below it count as zero; 127 divided by it still is a float32."""


def groups_of(columns: int, device: torch.device | None = None) -> Tensor:
    """Group of each column, int64 (columns,)."""
    k = torch.arange(columns, device=device)
    return k // 32 % 8 * 8 + k % 8


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``x`` (..., K), float32, to 8-bit integers.

    Returns:
        int8 (..., K), and the scale of each group, float32 (..., 64); NaN where a group holds inf or NaN.
    """
    group = groups_of(x.shape[-1], x.device).expand_as(x)
    largest = x.new_zeros(*x.shape[:-1], GROUPS).scatter_reduce(-1, group, x.abs(), "amax")
    finite = largest.isfinite()
    usable = finite & (largest >= LEAST)
    scale = torch.where(usable, largest / 127, 0.0).masked_fill(~finite, torch.nan)
    inverse = torch.where(usable, 127 / largest, 0.0).gather(-1, group)
    q = torch.where(inverse == 0, 0.0, x * inverse).round()
    return q.to(torch.int8), scale


def rounded(x: Tensor) -> Tensor:
    """``x`` (..., K), float32, as its 8-bit integers stand for it."""
    q, scale = quantize(x)
    return q * scale.gather(-1, groups_of(x.shape[-1], x.device).expand_as(x))


def binary_low_rank_linear_int8(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """Compute s1 * (U Q(V^T Q(s2 * x))) + bias, Q rounding to 8 bits; in float32, then in the dtype of ``x``.

    Args:
        x: (..., d_in), floating point; a token that holds inf or NaN gives NaN.
        u_signs: uint8 (d_out, ceil(rank / 8)), rows of U.
        v_signs: uint8 (rank, ceil(d_in / 8)), columns of V.
        s1: (d_out,) output scales.
        s2: (d_in,) input scales.
        bias: (d_out,) or None.
        rank: r.

    Returns:
        (..., d_out) in the dtype of ``x``.
    """
    single = torch.float32
    V_rows, U = unpack_signs(v_signs, s2.shape[0], single), unpack_signs(u_signs, rank, single)
    z = F.linear(rounded(x.to(single) * s2.to(single)), V_rows)  # (..., r)
    y = F.linear(rounded(z), U) * s1.to(single)  # (..., d_out), Eq. (1)
    return (y if bias is None else y + bias.to(single)).to(x.dtype)
