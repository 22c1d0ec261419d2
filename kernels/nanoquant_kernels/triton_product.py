"""A looked-up weight times a few tokens on a GPU: entries come from codebooks that stay in a core's own cache.

Layout as in :mod:`nanoquant_kernels.product`. A tile of the weight is looked up to registers and multiplied on tensor
cores, with float32 sums; nothing dense is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.cards import MOST_TOKENS
from nanoquant_kernels.indices import pack_indices
from nanoquant_kernels.triton_dot import ONE

BLOCK_R = 32
"""Rows of a tile."""
BLOCK_D = 64
"""Columns of a tile."""


@triton.jit
def entries_of(
    indices, book, rows, slab, d, inside, BYTES, G: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Entries (BLOCK_R, BLOCK_D) of one stage: an index lies in one byte, or in two neighbours."""
    bit = (d // G) * WIDTH
    at = rows.to(tl.int64)[:, None] * BYTES + (bit // 8)[None, :]
    word = tl.load(indices + at, mask=inside, other=0).to(tl.int32)
    if 8 % WIDTH != 0:
        more = inside & ((bit // 8 + 1)[None, :] < BYTES)
        word |= tl.load(indices + at + 1, mask=more, other=0).to(tl.int32) << 8
    entry = (word >> (bit % 8)[None, :]) & ((1 << WIDTH) - 1)
    place = ((slab[:, None] << WIDTH) + entry) * G + (d % G)[None, :]
    return tl.load(book + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def product_rows(
    x, indices, book, indices2, book2, scale, bias, out, N, slab_rows, D: tl.constexpr, bytes1, bytes2, tokens,
    G: tl.constexpr, WIDTH: tl.constexpr, WIDTH2: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """out[m, i] = scale_i * sum over d of entry[i, d] x[m, d] + bias_i; no bias is a null pointer, no stage width 0."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slab = rows // slab_rows
    m = tl.arange(0, M)
    acc = tl.zeros((BLOCK_R, M), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (rows[:, None] < N) & (d[None, :] < D)
        weight = entries_of(indices, book, rows, slab, d, inside, bytes1, G, WIDTH)
        if WIDTH2:
            weight += entries_of(indices2, book2, rows, slab, d, inside, bytes2, G, WIDTH2)
        part = tl.load(
            x + m[None, :] * D + d[:, None],
            mask=(m[None, :] < tokens) & (d[:, None] < D),
            other=0.0,
        )  # (BLOCK_D, M)
        acc = tl.dot(weight.to(part.dtype), part, acc)
    acc *= tl.load(scale + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    valid = (m[None, :] < tokens) & (rows[:, None] < N)
    tl.store(out + m[None, :] * N + rows[:, None], acc.to(out.dtype.element_ty), mask=valid)


def serves(x: Tensor) -> bool:
    """Whether the kernel takes this x: few tokens, and a dtype that tensor cores multiply."""
    return x.dtype in ONE and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]


def product_linear(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """As :func:`nanoquant_kernels.product.product_linear`, for what :func:`serves` takes.

    Raises:
        ValueError: no tokens, too many, or a dtype that tensor cores do not multiply.
    """
    if not serves(x):
        raise ValueError(
            f"this kernel takes 1 to {MOST_TOKENS} tokens in bfloat16 or float16, got "
            f"x of shape {tuple(x.shape)} in {x.dtype}"
        )
    x2 = x.reshape(-1, x.shape[-1]).contiguous()
    indices, codebook, scale = (t.contiguous() for t in (indices, codebook, scale))
    second = [None if t is None else t.contiguous() for t in (indices2, codebook2)]
    bias = None if bias is None else bias.contiguous()
    (tokens, D), N = x2.shape, scale.shape[0]
    R, K, G = codebook.shape
    y = x.new_empty(tokens, N)
    product_rows[(triton.cdiv(N, BLOCK_R),)](
        *(x2, indices, codebook, *second, scale, bias, y, N, N // R, D),
        *(indices.shape[1], 0 if indices2 is None else indices2.shape[1], tokens, G),
        WIDTH=K.bit_length() - 1,
        WIDTH2=0 if codebook2 is None else codebook2.shape[1].bit_length() - 1,
        BLOCK_R=BLOCK_R,
        BLOCK_D=BLOCK_D,
        M=8 if tokens <= 8 else 16,
        num_warps=4,
    )
    return y.view(*x.shape[:-1], N)


def trial(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...], group: int) -> tuple:
    """Arguments of a product of 3 tokens with a weight (100, 200) of two slabs."""
    g = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 200, generator=g), torch.randn(100, generator=g)
    scale = torch.rand(100, generator=g) + 0.5
    stages = []
    for width in widths:
        k = torch.randint(0, 2**width, (100, -(-200 // group)), generator=g)
        book = torch.randn(2, 2**width, group, generator=g)
        stages += [pack_indices(k, width).to(device), book.to(device, dtype)]
    stages += [None] * (4 - len(stages))
    return x.to(device, dtype), *stages, scale.to(device, dtype), bias.to(device, dtype)
