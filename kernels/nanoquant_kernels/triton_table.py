"""A head of 8-bit or 4-bit codes times a few tokens on a GPU: codes become numbers in registers, sums are float32.

Layout as in :mod:`nanoquant_kernels.table`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.cards import MOST_TOKENS
from nanoquant_kernels.triton_dot import ONE

BLOCK_R = 32
"""Rows of a tile."""


@triton.jit
def eight_bit_rows(
    x, codes, scales, bias, out, N, D: tl.constexpr, tokens,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """out[m, i] = scale_i * sum over k of code[i, k] x[m, k] + bias_i; no bias is a null pointer."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, M)
    acc = tl.zeros((BLOCK_R, M), tl.float32)
    at = rows.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < N) & (k[None, :] < D)
        code = tl.load(codes + at + k[None, :], mask=inside, other=0)
        part = tl.load(
            x + m[None, :] * D + k[:, None],
            mask=(m[None, :] < tokens) & (k[:, None] < D),
            other=0.0,
        )  # (BLOCK_D, M)
        acc = tl.dot(code.to(part.dtype), part, acc)
    acc *= tl.load(scales + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    store_rows(acc, bias, out, rows, m, N, tokens)


@triton.jit
def four_bit_rows(
    x, codes, scales, zeros, bias, out, N, D: tl.constexpr, G: tl.constexpr, tokens,
    BLOCK_R: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The same with 32 columns at a time: 16 in the low halves of 16 bytes, 16 in the high ones."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.arange(0, M)
    j = tl.arange(0, 16)
    acc = tl.zeros((BLOCK_R, M), tl.float32)
    at = rows.to(tl.int64)[:, None]
    for unit in range(0, D // 32):
        inside = rows[:, None] < N
        byte = tl.load(codes + at * (D // 2) + 16 * unit + j[None, :], mask=inside, other=0)
        byte = byte.to(tl.int32)
        group = at * G + unit * 32 // (D // G)  # (BLOCK_R, 1)
        offset = 8 + tl.load(zeros + group, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
        part = tl.zeros((BLOCK_R, M), tl.float32)
        for half in tl.static_range(2):
            values = ((byte >> (4 * half)) & 15) - offset
            xs = tl.load(
                x + m[None, :] * D + (32 * unit + 16 * half + j)[:, None],
                mask=m[None, :] < tokens,
                other=0.0,
            )  # (16, M)
            part = tl.dot(values.to(xs.dtype), xs, part)
        acc += part * scale
    store_rows(acc, bias, out, rows, m, N, tokens)


@triton.jit
def store_rows(acc, bias, out, rows, m, N, tokens):
    """out[m, rows] = acc + bias."""
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    inside = (m[None, :] < tokens) & (rows[:, None] < N)
    tl.store(out + m[None, :] * N + rows[:, None], acc.to(out.dtype.element_ty), mask=inside)


def serves(x: Tensor) -> bool:
    """Whether the kernels take this x: few tokens, and a dtype that tensor cores multiply."""
    return x.dtype in ONE and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]


def table_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """As :func:`nanoquant_kernels.table.table_linear`, for what :func:`serves` takes.

    Raises:
        ValueError: no tokens, too many, or a dtype that tensor cores do not multiply.
    """
    if not serves(x):
        raise ValueError(
            f"this kernel takes 1 to {MOST_TOKENS} tokens in bfloat16 or float16, got "
            f"x of shape {tuple(x.shape)} in {x.dtype}"
        )
    x2 = x.reshape(-1, x.shape[-1]).contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    (tokens, D), N = x2.shape, codes.shape[0]
    y = x.new_empty(tokens, N)
    grid = (triton.cdiv(N, BLOCK_R),)
    M = 8 if tokens <= 8 else 16
    if zeros is None:
        eight_bit_rows[grid](
            x2, codes, scales, bias, y, N, D, tokens, BLOCK_R=BLOCK_R, BLOCK_D=128, M=M, num_warps=2
        )
    else:
        zeros = zeros.contiguous()
        four_bit_rows[grid](
            *(x2, codes, scales, zeros, bias, y, N, D, scales.shape[1], tokens),
            BLOCK_R=BLOCK_R,
            M=M,
            num_warps=2,
        )
    return y.view(*x.shape[:-1], N)


def trial(device: torch.device, dtype: torch.dtype, bits: int) -> tuple:
    """Arguments of a product of 3 tokens with a table (100, 256)."""
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 256, generator=g), torch.randn(100, generator=g)
    groups = 1 if bits == 8 else 4
    scales = torch.rand(100, groups, generator=g) + 0.5
    codes = torch.randint(0, 256, (100, 256 * bits // 8), generator=g)
    codes = (codes - 128).to(torch.int8) if bits == 8 else codes.to(torch.uint8)
    zeros = None if bits == 8 else torch.randint(-8, 8, (100, groups), generator=g).to(torch.int8)
    real = [t.to(device, dtype) for t in (x, scales, bias)]
    return real[0], codes.to(device), real[1], None if zeros is None else zeros.to(device), real[2]
