"""Signs unpacked on the GPU to matrices of -1 and +1, then two dense products: any dtype, any number of tokens.

The oracle of the other kernels, and the fallback where they do not serve. The dense weight s1 U V^T s2 is never
formed, and of U and V only ``SCRATCH`` bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

SCRATCH = 100 * 2**20
"""Bytes of unpacked signs at a time."""


@triton.jit
def unpack_rows(signs, out, K, stride, BLOCK: tl.constexpr):
    """out[r, k] = -1 where bit k % 8 of byte k // 8 of row r is set, else 1."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(signs + row * stride + k // 8, mask=k < K, other=0).to(tl.int32)
    value = 1 - 2 * ((byte >> (k % 8)) & 1)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


def unpack_signs(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """As :func:`nanoquant_kernels.layout.unpack_signs`: uint8 (R, ceil(K / 8)) to (R, K) in ``dtype``."""
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    out = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    if out.numel():
        grid = packed.shape[0], triton.cdiv(columns, 1024)
        unpack_rows[grid](packed, out, columns, packed.stride(0), BLOCK=1024)
    return out


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`; scales and bias act in float32."""
    z = signed_product((x.float() * s2.float()).to(x.dtype), v_signs)
    y = signed_product(z, u_signs).float() * s1.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def signed_product(x: Tensor, signs: Tensor) -> Tensor:
    """X (..., K) times the transpose of packed signs uint8 (R, ceil(K / 8)): (..., R)."""
    K = x.shape[-1]
    rows = max(1, SCRATCH // (K * x.element_size()))
    parts = [F.linear(x, unpack_signs(part, K, x.dtype)) for part in signs.split(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
