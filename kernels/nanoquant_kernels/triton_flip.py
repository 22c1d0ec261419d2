"""One token against signs without tensor cores: signs flip pairs of float16 activations, which are then added.

For cards whose tensor cores multiply too slowly. Pairs are added in float16 in chains of eight, chains in float32.
No sum can overflow: x is scaled by a power of two so that the absolute values of s2 * x add up to at most 2**15, and
the latent by 2**-ceil(log2 r). Both powers are undone, exactly, with s1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.planes import PLANES, as_words
from nanoquant_kernels.tiles import FlipTile
from nanoquant_kernels.triton_dot import INTERPRETED

SUM_BITS = 15
"""Absolute values of what is summed add up to at most 2**15; float16 ends at 65504."""


@triton.constexpr_function
def flip_instructions(plane: int) -> str:
    """The three instructions that flip a pair by bit ``plane`` of two words and add it to a chain."""
    return (
        f"{{ .reg .b32 t; shl.b32 t, $1, {15 - plane}; "
        "lop3.b32 t, t, 0x80008000, $2, 0x6A; add.f16x2 $0, $3, t; }"
    )


@triton.jit
def low_half(pairs):
    """The lower float16 of each pair, as float32."""
    return (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(pairs):
    """The upper float16 of each pair, as float32."""
    return (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def flip_and_add(words, pair, chain, plane: tl.constexpr, asm: tl.constexpr):
    """Chain + pair, the pair flipped by bit ``plane`` of both 16-bit words; all int32 of the same shape."""
    if asm:
        return tl.inline_asm_elementwise(
            flip_instructions(plane),
            "=r,r,r,r",
            [words, pair, chain],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    flipped = pair ^ ((words << (15 - plane)) & -2147450880)  # 0x80008000
    low = (low_half(flipped) + low_half(chain)).to(tl.float16).to(tl.int16, bitcast=True)
    high = (high_half(flipped) + high_half(chain)).to(tl.float16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def flipped_sums(
    pairs, words, rows, R, Q: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """Sum over k of sign[r, k] x[k], (BLOCK_R,) in float32; pairs (16, Q) in plane order, words (R, Q)."""
    total = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        inside = (rows[:, None] < R) & (q[None, :] < Q)
        w = tl.load(words + rows[:, None] * Q + q[None, :], mask=inside, other=0)
        for half in tl.static_range(2):
            chain = tl.zeros((BLOCK_R, BLOCK_Q), tl.int32)
            for step in tl.static_range(8):
                pair = tl.load(pairs + (8 * half + step) * Q + q, mask=q < Q, other=0)
                pair = tl.broadcast_to(pair[None, :], (BLOCK_R, BLOCK_Q))
                chain = flip_and_add(w, pair, chain, 8 * half + step, asm)
            total += low_half(chain) + high_half(chain)
    return tl.sum(total, 1)


@triton.jit
def scale_to_halves(
    x, scale, out, undo, K: tl.constexpr, P: tl.constexpr, SUM_BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[j P + w] = x[16 w + j] * scale[16 w + j] / undo[0] in float16, 0 from column K on; one program."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        sums += tl.abs(value * tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32))
    norm = tl.sum(sums, 0)
    exponent = tl.where(norm == 0, 0.0, tl.floor(tl.log2(norm)) + 1 - SUM_BITS)
    exponent = tl.maximum(exponent, -126.0)  # its power and that of its opposite are finite
    tl.store(undo, tl.exp2(exponent))
    for start in range(0, 16 * P, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k = 16 * (at % P) + at // P
        inside = (at < 16 * P) & (k < K)
        value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(scale + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, (value * tl.exp2(-exponent)).to(tl.float16), mask=at < 16 * P)


@triton.jit
def latent_stage(
    pairs, words, out, R, Q: tl.constexpr, P_OUT, shrink, asm: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """V^T x * shrink in float16 and plane order of ``P_OUT`` words; rows from R on are 0."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    z = flipped_sums(pairs, words, rows, R, Q, asm, BLOCK_R, BLOCK_Q) * shrink
    z = tl.where(rows < R, z, 0.0)
    tl.store(out + (rows % 16) * P_OUT + rows // 16, z.to(tl.float16), mask=rows < 16 * P_OUT)


@triton.jit
def output_stage(
    pairs, words, scale, undo, bias, out, R, Q: tl.constexpr, grow, asm: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Scale * (U z) * grow * undo[0] + bias; no bias is a null pointer."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    y = flipped_sums(pairs, words, rows, R, Q, asm, BLOCK_R, BLOCK_Q) * (grow * tl.load(undo))
    y *= tl.load(scale + rows, mask=rows < R, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < R, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=rows < R)


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
    v_tile: FlipTile | None = None,
    u_tile: FlipTile | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`, for one token of any floating dtype.

    Args:
        x: (..., d_in), one token.
        u_signs: uint8 (d_out, ceil(rank / 8)).
        v_signs: uint8 (rank, ceil(d_in / 8)).
        s1: (d_out,).
        s2: (d_in,).
        bias: (d_out,) or None.
        rank: r.
        v_tile: how the first stage is cut; none means a tile that runs everywhere.
        u_tile: the same for the second stage.

    Raises:
        ValueError: more tokens, or none.
    """
    d_in, d_out = s2.shape[0], s1.shape[0]
    if x.numel() != d_in:
        raise ValueError(f"this kernel takes one token, got {x.numel() // d_in}")
    s1, s2, bias = s1.contiguous(), s2.contiguous(), None if bias is None else bias.contiguous()
    v_words, u_words = as_words(v_signs, torch.int32), as_words(u_signs, torch.int32)
    Q, Q_rank = v_words.shape[1], u_words.shape[1]
    halves = x.new_empty(2 * PLANES * Q, dtype=torch.float16)
    undo = x.new_empty(1, dtype=torch.float32)
    scale_to_halves[(1,)](
        *(x.contiguous(), s2, halves, undo, d_in, 2 * Q, SUM_BITS), BLOCK=1024, num_warps=8
    )
    latent = x.new_empty(2 * PLANES * Q_rank, dtype=torch.float16)
    power = (rank - 1).bit_length()
    grid, options = launch(v_tile, 2 * PLANES * Q_rank)
    latent_stage[grid](
        *(halves.view(torch.int32), v_words, latent, rank, Q, 2 * Q_rank, 2.0**-power), **options
    )
    y = x.new_empty((*x.shape[:-1], d_out))
    grid, options = launch(u_tile, d_out)
    output_stage[grid](
        *(latent.view(torch.int32), u_words, s1, undo, bias, y, d_out, Q_rank, 2.0**power),
        **options,
    )
    return y


def launch(tile: FlipTile | None, rows: int) -> tuple[tuple[int], dict]:
    """Grid and options of a stage of ``rows`` rows."""
    tile = tile or FlipTile()
    options = {
        "asm": not INTERPRETED,
        "BLOCK_R": tile.rows,
        "BLOCK_Q": 32,
        "num_warps": tile.warps,
    }
    return (triton.cdiv(rows, tile.rows),), options
