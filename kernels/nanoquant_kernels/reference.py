"""The product with a packed weight in plain PyTorch: the truth that every kernel is tested against.

Shapes: x (..., d_in), u_signs uint8 (d_out, ceil(r / 8)), v_signs uint8 (r, ceil(d_in / 8)), s1
(d_out,), s2 (d_in,), bias (d_out,). The dense weight s1 U V^T s2 is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanoquant_kernels.layout import unpack_signs


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """Compute s1 * (U (V^T (s2 * x))) + bias in the dtype of ``x`` (arXiv 2602.06694, Eq. 1).

    Args:
        x: (..., d_in), floating point.
        u_signs: uint8 (d_out, ceil(rank / 8)), rows of U.
        v_signs: uint8 (rank, ceil(d_in / 8)), columns of V.
        s1: (d_out,) output scales, cast to the dtype of ``x``.
        s2: (d_in,) input scales, cast to the dtype of ``x``.
        bias: (d_out,) or None.
        rank: r.

    Returns:
        (..., d_out) in the dtype of ``x``.
    """
    dtype = x.dtype
    z = F.linear(x * s2.to(dtype), unpack_signs(v_signs, s2.shape[0], dtype))  # (..., r)
    y = F.linear(z, unpack_signs(u_signs, rank, dtype)) * s1.to(dtype)  # (..., d_out), Eq. (1)
    return y if bias is None else y + bias.to(dtype)


def binary_low_rank_linear_backward(
    grad: Tensor,
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    rank: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`binary_low_rank_linear` with respect to x, s1 and s2.

    Args:
        grad: (..., d_out), gradient at the output.
        x: as in the forward pass, like ``u_signs``, ``v_signs``, ``s1``, ``s2`` and ``rank``.
        u_signs: see ``x``.
        v_signs: see ``x``.
        s1: see ``x``.
        s2: see ``x``.
        rank: see ``x``.
        needs: which of the gradients of x, s1 and s2 are wanted; the others are None.

    Returns:
        Gradients (..., d_in), (d_out,) and (d_in,), in the dtypes of x, s1 and s2; sums over tokens
        in float32.
    """
    dtype = x.dtype
    needs_x, needs_s1, needs_s2 = needs
    U, V = (
        unpack_signs(u_signs, rank, dtype),
        unpack_signs(v_signs, s2.shape[0], dtype),
    )  # (d_out, r), (r, d_in)
    grad_x = grad_s1 = grad_s2 = None
    if needs_s1:
        product = F.linear(F.linear(x * s2.to(dtype), V), U)  # (..., d_out)
        grad_s1 = sum_tokens(grad * product, s1.dtype)
    if needs_x or needs_s2:
        grad_scaled = torch.matmul(
            torch.matmul(grad * s1.to(dtype), U), V
        )  # (..., d_in), at s2 * x
        grad_x = grad_scaled * s2.to(dtype) if needs_x else None
        grad_s2 = sum_tokens(grad_scaled * x, s2.dtype) if needs_s2 else None
    return grad_x, grad_s1, grad_s2


def sum_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum (..., d) over all leading dimensions in float32 or better, (d,) in ``dtype``."""
    accumulator = torch.promote_types(x.dtype, torch.float32)
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=accumulator).to(dtype)
