"""Linears that read the same x, such as q, k and v, in three launches together instead of three each.

A table on the device names for each tile of rows where its signs, scales and outputs lie, so nothing is copied or
padded. All members' latents stand in the plane order of the widest one; columns that a member lacks are 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.cards import MOST_TOKENS
from nanoquant_kernels.layout import ALIGNMENT
from nanoquant_kernels.outputs import starts_of
from nanoquant_kernels.planes import PLANES
from nanoquant_kernels.tiles import DotTile
from nanoquant_kernels.triton_dot import ONE, launch, scale_to_planes, signed_sums

FIELDS = 8
"""Of a tile: address of words, units between rows, rows, first row, member, units held, addresses of scale and bias."""
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def scale_for_each(x, scales, out, K, P, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x * scale_i in plane order, for each member i; tokens and columns as in ``scale_to_planes``."""
    member = tl.program_id(2)
    scale = tl.load(scales + member).to(tl.pointer_type(DTYPE))
    scale_to_planes(x, scale, out + member * tl.num_programs(0) * 16 * P, K, P, BLOCK)


@triton.jit
def stacked_latent_stage(
    table, x, out, P: tl.constexpr, P_OUT, tokens, FIELDS: tl.constexpr, UNIT: tl.constexpr,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """V_i^T x_i of every member i in plane order of ``P_OUT`` words; rows that a member lacks are 0."""
    tile = table + tl.program_id(0) * FIELDS
    words = tl.multiple_of(tl.load(tile).to(tl.pointer_type(tl.int16)), 16)
    stride, R = tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    rows = tl.load(tile + 3).to(tl.int32) + tl.arange(0, BLOCK_R)
    member, held = tl.load(tile + 4).to(tl.int32), tl.load(tile + 5).to(tl.int32) * UNIT
    m = tl.arange(0, M)
    x += member * tokens * 16 * P
    acc = signed_sums(
        x, words, rows, R, P, held, m, tokens, stride, UNIT, one, asm, BLOCK_R, BLOCK_P, M
    )
    acc = tl.where(rows[:, None] < R, acc, 0.0)
    at = m[None, :] * (16 * P_OUT) + ((rows % 16) * P_OUT + rows // 16)[:, None]
    inside = (m[None, :] < tokens) & (rows[:, None] < 16 * P_OUT)
    out += member * tokens * 16 * P_OUT
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def stacked_output_stage(
    table, x, out, starts, P: tl.constexpr, tokens, FIELDS: tl.constexpr, UNIT: tl.constexpr,
    SCALE: tl.constexpr, BIAS: tl.constexpr,
    one: tl.constexpr, asm: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Scale_i * (U_i x_i) + bias_i of every member; outputs stand one after the other, without bias at address 0."""
    tile = table + tl.program_id(0) * FIELDS
    words = tl.multiple_of(tl.load(tile).to(tl.pointer_type(tl.int16)), 16)
    stride, R = tl.load(tile + 1).to(tl.int32), tl.load(tile + 2).to(tl.int32)
    rows = tl.load(tile + 3).to(tl.int32) + tl.arange(0, BLOCK_R)
    member, held = tl.load(tile + 4).to(tl.int32), tl.load(tile + 5).to(tl.int32) * UNIT
    m = tl.arange(0, M)
    x += member * tokens * 16 * P
    acc = signed_sums(
        x, words, rows, R, P, held, m, tokens, stride, UNIT, one, asm, BLOCK_R, BLOCK_P, M
    )
    scale = tl.load(tile + 6).to(tl.pointer_type(SCALE))
    acc *= tl.load(scale + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(tile + 7)
    biased = tl.where(bias != 0, R, 0)
    added = tl.load(bias.to(tl.pointer_type(BIAS)) + rows, mask=rows < biased, other=0.0)
    acc += added.to(tl.float32)[:, None]
    out += tl.load(starts + member) * tokens
    inside = (m[None, :] < tokens) & (rows[:, None] < R)
    tl.store(out + m[None, :] * R + rows[:, None], acc.to(out.dtype.element_ty), mask=inside)


def serves(
    x: Tensor,
    u_signs: list[Tensor],
    v_signs: list[Tensor],
    s1: list[Tensor],
    s2: list[Tensor],
    bias: list[Tensor | None],
) -> bool:
    """Whether one launch takes them all: few tokens, scales and biases of one dtype each, rows aligned alike."""
    biases = [b for b in bias if b is not None]
    vectors = (*s1, *s2, *biases)
    return (
        0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        and x.dtype in ONE
        and len({t.dtype for t in (*s1, *s2)}) == 1
        and len({b.dtype for b in biases}) <= 1
        and all(t.dtype in TYPES and t.is_contiguous() for t in vectors)
        and all(map(_aligned, (*u_signs, *v_signs)))
        and len({t.stride(0) for t in v_signs}) == 1
    )


def _aligned(signs: Tensor) -> bool:
    """Whether rows of signs start at whole words, with nothing but padding between them."""
    gap = signs.stride(0) - signs.shape[1]
    even = signs.stride(0) % 2 == 0 and signs.data_ptr() % ALIGNMENT == 0
    return signs.shape[0] > 1 and even and signs.stride(1) == 1 and 0 <= gap < ALIGNMENT


def binary_low_rank_linears(
    x: Tensor,
    u_signs: list[Tensor],
    v_signs: list[Tensor],
    s1: list[Tensor],
    s2: list[Tensor],
    bias: list[Tensor | None],
    ranks: list[int],
    tile: DotTile | None = None,
) -> Tensor:
    """Each member's s1 * (U (V^T (s2 * x))) + bias for the same x (..., d_in); see :mod:`nanoquant_kernels.outputs`.

    Raises:
        ValueError: :func:`serves` says no.
    """
    if not serves(x, u_signs, v_signs, s1, s2, bias):
        raise ValueError(
            f"these linears can't share launches: x {tuple(x.shape)} in {x.dtype} must be 1 to "
            f"{MOST_TOKENS} tokens in bfloat16 or float16, scales of one dtype, biases of one dtype, "
            "and packed rows aligned in the same way"
        )
    d_in, outs = x.shape[-1], tuple(t.shape[0] for t in s1)
    x2 = x.reshape(-1, d_in).contiguous()
    tokens, members = x2.shape[0], len(ranks)
    held = tuple(t.stride(0) // 2 for t in u_signs)
    P, P_rank = v_signs[0].stride(0) // 2, max(held)
    _, options = launch(tile, max(outs), max(P, P_rank), x2)
    addresses = (
        tuple(0 if t is None else t.data_ptr() for t in group)
        for group in (u_signs, v_signs, s1, s2, bias)
    )
    v_table, u_table, scales, starts = tables(
        (*addresses, P, held, outs, tuple(ranks), options["BLOCK_R"], x.device)
    )
    shared = {"FIELDS": FIELDS, "one": ONE[x.dtype]} | options
    scaled = x.new_empty(members, tokens, PLANES * P)
    grid = tokens, triton.cdiv(PLANES * P, 512), members
    scale_for_each[grid](x2, scales, scaled, d_in, P, DTYPE=TYPES[s1[0].dtype], BLOCK=512)
    latent = x.new_empty(members, tokens, PLANES * P_rank)
    stacked_latent_stage[(len(v_table),)](
        *(v_table, scaled, latent, P, P_rank, tokens), UNIT=common_unit(P), **shared
    )
    y = x.new_empty(tokens * starts_of(outs)[-1])
    kinds = [b.dtype for b in bias if b is not None] or [torch.float32]
    stacked_output_stage[(len(u_table),)](
        *(u_table, latent, y, starts, P_rank, tokens),
        UNIT=common_unit(*held),
        SCALE=TYPES[s1[0].dtype],
        BIAS=TYPES[kinds[0]],
        **shared,
    )
    return y


def common_unit(*words: int) -> int:
    """Largest power of two up to 16 that divides the words of every row."""
    return math.gcd(16, *words)


_tables: dict[tuple, tuple[Tensor, Tensor, Tensor, Tensor]] = {}


def tables(key: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of both stages, addresses of s2, and where each member's output starts, as int64 on the device.

    The key is addresses and sizes: they are all that a table holds, so it is right whenever they are the same. Tables
    are kept for good, because captured graphs read them; they are small.
    """
    if key not in _tables:
        u_signs, v_signs, s1, s2, bias, P, held, outs, ranks, block, device = key
        v_tiles, u_tiles = [], []
        v_unit, u_unit = common_unit(P), common_unit(*held)
        for i, (rank, d_out) in enumerate(zip(ranks, outs, strict=True)):
            for first in range(0, PLANES * max(held), block):
                v_tiles.append([v_signs[i], P // v_unit, rank, first, i, P // v_unit, 0, 0])
            for first in range(0, d_out, block):
                units = held[i] // u_unit
                tile = [u_signs[i], units, d_out, first, i, units, s1[i], bias[i]]
                u_tiles.append(tile)
        _tables[key] = tuple(
            torch.tensor(values, dtype=torch.int64).to(device)
            for values in (v_tiles, u_tiles, s2, starts_of(outs)[:-1])
        )
    return _tables[key]
