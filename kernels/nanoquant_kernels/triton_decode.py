"""Decode on tensor cores: a stage of 1 to 16 tokens, signs made in registers, float32 accumulation.

y = s1 * (U (V^T (s2 * x))) + bias runs as three kernels: ``scale_to_planes`` writes s2 * x in plane order (see
:mod:`nanoquant_kernels.planes`), ``latent_stage`` multiplies with V and writes the latent in plane order again, and
``output_stage`` multiplies with U, scales and adds the bias. Each is checked against the reference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.planes import PLANES, as_words, words_of

ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
"""Bits of 1.0 in the dtypes that tensor cores multiply."""
MOST_TOKENS = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter knows no inline instructions."""


@triton.constexpr_function
def plane_instructions(plane: int, one: int) -> str:
    """The two instructions that turn two words in a register into two signs of a plane."""
    combine = (
        f"lop3.b32 $0, {'$1' if plane == 15 else 't'}, 0x80008000, 0x{one << 16 | one:08X}, 0xEA;"
    )
    shift = f"shl.b32 t, $1, {15 - plane};"
    return combine if plane == 15 else "{ .reg .b32 t; " + shift + " " + combine + " }"


@triton.jit
def plane_signs(
    words, plane: tl.constexpr, one: tl.constexpr, dtype: tl.constexpr, asm: tl.constexpr
):
    """Signs of one plane as +1 and -1: bit ``plane`` of each word becomes the sign bit of 1.0."""
    if asm:  # two words a register
        signs = tl.inline_asm_elementwise(
            plane_instructions(plane, one), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        signs = (((words << (15 - plane)) & -32768) | one).to(tl.int16)
    return signs.to(dtype, bitcast=True)


@triton.jit
def signed_sums(
    x, words, rows, R, P: tl.constexpr, tokens, stride, UNIT: tl.constexpr,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sum over k of sign[r, k] x[m, k] for ``rows`` (BLOCK_R,), (BLOCK_R, M) in float32.

    Rows of words are ``stride`` UNITs apart: a unit known at compile time tells how wide a load may be.
    """
    m = tl.arange(0, M)
    acc = tl.zeros((BLOCK_R, M), tl.float32)
    for start in range(0, P, BLOCK_P):
        c = start + tl.arange(0, BLOCK_P)
        w = tl.load(
            words + rows[:, None] * (stride * UNIT) + c[None, :],
            mask=(rows[:, None] < R) & (c[None, :] < P),
            other=0,
        )
        for plane in tl.static_range(16):
            part = tl.load(
                x + m[None, :] * (16 * P) + (plane * P + c)[:, None],
                mask=(m[None, :] < tokens) & (c[:, None] < P),
                other=0.0,
            )  # (BLOCK_P, M)
            signs = plane_signs(w, plane, one, part.dtype, asm)
            acc = tl.dot(signs, part, acc)
    return acc


@triton.jit
def scale_to_planes(x, scale, out, K, P, BLOCK: tl.constexpr):
    """out[m, j P + w] = x[m, 16 w + j] * scale[16 w + j], 0 from column K on."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = 16 * (at % P) + at // P
    inside = (at < 16 * P) & (k < K)
    token = tl.program_id(0)
    value = tl.load(x + token * K + k, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * 16 * P + at, value.to(out.dtype.element_ty), mask=at < 16 * P)


@triton.jit
def latent_stage(
    x, words, out, R, P: tl.constexpr, P_OUT, tokens, stride, UNIT: tl.constexpr,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """V^T x in plane order of ``P_OUT`` words; rows from R on are 0."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = signed_sums(x, words, rows, R, P, tokens, stride, UNIT, one, asm, BLOCK_R, BLOCK_P, M)
    acc = tl.where(rows[:, None] < R, acc, 0.0)
    m = tl.arange(0, M)
    at = m[None, :] * (16 * P_OUT) + ((rows % 16) * P_OUT + rows // 16)[:, None]
    inside = (m[None, :] < tokens) & (rows[:, None] < 16 * P_OUT)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def output_stage(
    x, words, scale, bias, out, R, P: tl.constexpr, tokens, stride, UNIT: tl.constexpr,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Scale * (U x) + bias; no bias is a null pointer."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = signed_sums(x, words, rows, R, P, tokens, stride, UNIT, one, asm, BLOCK_R, BLOCK_P, M)
    acc *= tl.load(scale + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    m = tl.arange(0, M)
    inside = (m[None, :] < tokens) & (rows[:, None] < R)
    tl.store(out + m[None, :] * R + rows[:, None], acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tile:
    """How a stage is cut: rows and words of a tile, warps, pipeline stages."""

    rows: int = 32
    words: int = 64
    warps: int = 2
    stages: int = 3


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
    tile: Tile | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`, for up to ``MOST_TOKENS`` tokens.

    Raises:
        ValueError: more tokens, or a dtype that tensor cores do not multiply.
    """
    d_in, d_out, tile = s2.shape[0], s1.shape[0], tile or Tile()
    tokens = x.numel() // d_in
    if tokens > MOST_TOKENS or x.dtype not in ONE:
        raise ValueError(
            f"this kernel takes up to {MOST_TOKENS} tokens in bfloat16 or float16, got {tokens} in {x.dtype}"
        )
    y = x.new_empty((*x.shape[:-1], d_out))
    if not tokens:
        return y
    P, P_rank = words_of(d_in), words_of(rank)
    scaled = x.new_empty(tokens, PLANES * P)
    scale_to_planes[tokens, triton.cdiv(PLANES * P, 512)](
        x.contiguous(), s2, scaled, d_in, P, BLOCK=512
    )
    latent = x.new_empty(tokens, PLANES * P_rank)
    options = {
        "one": ONE[x.dtype],
        "asm": not INTERPRETED,
        "BLOCK_R": tile.rows,
        "M": 8 if tokens <= 8 else 16,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    words, stride, unit = rows_of(v_signs)
    latent_stage[(triton.cdiv(PLANES * P_rank, tile.rows),)](
        *(scaled, words, latent, rank, P, P_rank, tokens, stride, unit),
        BLOCK_P=width(tile, P),
        **options,
    )
    words, stride, unit = rows_of(u_signs)
    output_stage[(triton.cdiv(d_out, tile.rows),)](
        *(latent, words, s1, bias, y, d_out, P_rank, tokens, stride, unit),
        BLOCK_P=width(tile, P_rank),
        **options,
    )
    return y


def rows_of(signs: Tensor) -> tuple[Tensor, int, int]:
    """Words (R, P), and the distance of two rows as a multiple of the largest unit up to 16 words."""
    words = as_words(signs)
    stride = words.stride(0)
    unit = next(unit for unit in (16, 8, 4, 2, 1) if stride % unit == 0)
    return words, stride // unit, unit


def width(tile: Tile, words: int) -> int:
    """Words of a tile: the tile's own, or fewer for short rows; tensor cores want 16 or more."""
    return max(16, min(tile.words, triton.next_power_of_2(words)))
