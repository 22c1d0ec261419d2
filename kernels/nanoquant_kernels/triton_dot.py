"""Signs against activations on tensor cores: signs made in registers, float32 accumulation, any number of tokens.

y = s1 * (U (V^T (s2 * x))) + bias runs as three kernels: ``scale_to_planes`` writes s2 * x in plane order (see
:mod:`nanoquant_kernels.planes`), ``latent_stage`` multiplies with V and writes the latent in plane order again, and
``output_stage`` multiplies with U, scales and adds the bias. Each is checked against the reference.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.planes import PLANES, as_words
from nanoquant_kernels.tiles import DotTile

ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
"""Bits of 1.0 in the dtypes that tensor cores multiply."""
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter knows no inline instructions."""
TOKENS_A_LAUNCH = 8192
"""More tokens run in several launches, so that scratch stays small."""
LAST_OFFSET = 2**31 - 1
"""Offsets are 32-bit numbers."""


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
    x, words, rows, R, P: tl.constexpr, held, m, tokens, stride, UNIT: tl.constexpr,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sum over k of sign[r, k] x[m, k] for ``rows`` (BLOCK_R,) and tokens ``m`` (M,), (BLOCK_R, M) in float32.

    A row holds ``held`` words, of P that x has. Rows are ``stride`` UNITs apart: a unit known at compile time tells
    how wide a load may be.
    """
    acc = tl.zeros((BLOCK_R, M), tl.float32)
    for start in range(0, P, BLOCK_P):
        c = start + tl.arange(0, BLOCK_P)
        w = tl.load(
            words + rows[:, None] * (stride * UNIT) + c[None, :],
            mask=(rows[:, None] < R) & (c[None, :] < held),
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
    x, words, out, R, P: tl.constexpr, P_OUT, tokens,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """V^T x in plane order of ``P_OUT`` words; rows from R on are 0."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1) * M + tl.arange(0, M)
    acc = signed_sums(x, words, rows, R, P, P, m, tokens, 1, P, one, asm, BLOCK_R, BLOCK_P, M)
    acc = tl.where(rows[:, None] < R, acc, 0.0)
    at = m[None, :] * (16 * P_OUT) + ((rows % 16) * P_OUT + rows // 16)[:, None]
    inside = (m[None, :] < tokens) & (rows[:, None] < 16 * P_OUT)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def output_stage(
    x, words, scale, bias, out, R, P: tl.constexpr, tokens,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Scale * (U x) + bias; no bias is a null pointer."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1) * M + tl.arange(0, M)
    acc = signed_sums(x, words, rows, R, P, P, m, tokens, 1, P, one, asm, BLOCK_R, BLOCK_P, M)
    acc *= tl.load(scale + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    inside = (m[None, :] < tokens) & (rows[:, None] < R)
    tl.store(out + m[None, :] * R + rows[:, None], acc.to(out.dtype.element_ty), mask=inside)


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
    v_tile: DotTile | None = None,
    u_tile: DotTile | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`, with float32 accumulation.

    Args:
        x: (..., d_in), bfloat16 or float16.
        u_signs: uint8 (d_out, ceil(rank / 8)).
        v_signs: uint8 (rank, ceil(d_in / 8)).
        s1: (d_out,).
        s2: (d_in,).
        bias: (d_out,) or None.
        rank: r.
        v_tile: how the first stage is cut; none means a tile that runs everywhere.
        u_tile: the same for the second stage.

    Raises:
        ValueError: a dtype that tensor cores do not multiply.
    """
    if x.dtype not in ONE:
        raise ValueError(f"this kernel takes bfloat16 or float16, got {x.dtype}")
    d_in, d_out = s2.shape[0], s1.shape[0]
    y = x.new_empty((*x.shape[:-1], d_out))
    s1, s2, bias = s1.contiguous(), s2.contiguous(), None if bias is None else bias.contiguous()
    rows = x.reshape(-1, d_in).contiguous(), y.view(-1, d_out)
    widest = 2 * max(d_in, d_out, rank, PLANES)  # padding less than doubles a row
    step = max(1, min(TOKENS_A_LAUNCH, LAST_OFFSET // widest))
    for x_part, y_part in zip(*(t.split(step) for t in rows), strict=True):
        if x_part.shape[0]:
            _product(x_part, y_part, (v_signs, s2, v_tile), (u_signs, s1, u_tile), bias, rank)
    return y


def _product(x: Tensor, y: Tensor, v: tuple, u: tuple, bias: Tensor | None, rank: int) -> None:
    """Three launches that write ``y`` (tokens, d_out) from ``x`` (tokens, d_in), both contiguous."""
    (v_signs, s2, v_tile), (u_signs, s1, u_tile) = v, u
    (tokens, d_in), d_out = x.shape, y.shape[1]
    v_words, u_words = as_words(v_signs), as_words(u_signs)
    P, P_rank = v_words.shape[1], u_words.shape[1]
    scaled = x.new_empty(tokens, PLANES * P)
    grid = tokens, triton.cdiv(PLANES * P, 512)
    scale_to_planes[grid](x, s2, scaled, d_in, P, BLOCK=512)
    latent = x.new_empty(tokens, PLANES * P_rank)
    grid, options = launch(v_tile, PLANES * P_rank, P, x)
    latent_stage[grid](scaled, v_words, latent, rank, P, P_rank, tokens, ONE[x.dtype], **options)
    grid, options = launch(u_tile, d_out, P_rank, x)
    output_stage[grid](latent, u_words, s1, bias, y, d_out, P_rank, tokens, ONE[x.dtype], **options)


def launch(tile: DotTile | None, rows: int, words: int, x: Tensor) -> tuple[tuple, dict]:
    """Grid and options of a stage of ``rows`` rows of ``words`` words for x (tokens, d_in)."""
    tokens = x.shape[0]
    tile = tile or DotTile()
    m = 8 if tokens <= 8 else min(16, tile.tokens) if tokens <= 16 else tile.tokens
    options = {
        "asm": not INTERPRETED,
        "BLOCK_R": tile.rows,
        "BLOCK_P": max(16, min(tile.words, triton.next_power_of_2(words))),  # of tl.dot: 16 or more
        "M": m,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (triton.cdiv(rows, tile.rows), triton.cdiv(tokens, m)), options
