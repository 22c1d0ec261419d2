"""Decode on tensor cores: a stage of 1 to 16 tokens, signs made in registers, float32 accumulation.

y = s1 * (U (V^T (s2 * x))) + bias runs as three kernels: ``scale_to_planes`` writes s2 * x in plane order (see
:mod:`nanoquant_kernels.planes`), ``latent_stage`` multiplies with V and writes the latent in plane order again, and
``output_stage`` multiplies with U, scales and adds the bias. Each is checked against the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoquant_kernels.planes import PLANES, as_words, words_of

ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
"""Bits of 1.0 in the dtypes that tensor cores multiply."""
MOST_TOKENS = 16


@triton.constexpr_function
def plane_instructions(plane: int, one: int) -> str:
    """The two instructions that turn two words in a register into two signs of a plane."""
    combine = f"lop3.b32 $0, {'$1' if plane == 15 else 't'}, 0x80008000, 0x{one << 16 | one:08X}, 0xEA;"
    shift = f"shl.b32 t, $1, {15 - plane};"
    return combine if plane == 15 else "{ .reg .b32 t; " + shift + " " + combine + " }"


@triton.jit
def plane_signs(words, plane: tl.constexpr, one: tl.constexpr, dtype: tl.constexpr, asm: tl.constexpr):
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
    x, words, rows, R, P: tl.constexpr, tokens, stride, one: tl.constexpr, asm: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sum over k of sign[r, k] x[m, k] for ``rows`` (BLOCK_R,), (BLOCK_R, M) in float32."""
    m = tl.arange(0, M)
    acc = tl.zeros((BLOCK_R, M), tl.float32)
    for start in range(0, P, BLOCK_P):
        c = start + tl.arange(0, BLOCK_P)
        w = tl.load(
            words + rows[:, None] * stride + c[None, :],
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
    x, words, out, R, P: tl.constexpr, P_OUT, tokens, stride, one: tl.constexpr, asm: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """V^T x in plane order of ``P_OUT`` words; rows from R on are 0."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = signed_sums(x, words, rows, R, P, tokens, stride, one, asm, BLOCK_R, BLOCK_P, M)
    acc = tl.where(rows[:, None] < R, acc, 0.0)
    m = tl.arange(0, M)
    at = m[None, :] * (16 * P_OUT) + ((rows % 16) * P_OUT + rows // 16)[:, None]
    inside = (m[None, :] < tokens) & (rows[:, None] < 16 * P_OUT)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def output_stage(
    x, words, scale, bias, out, R, P: tl.constexpr, tokens, stride, one: tl.constexpr, asm: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """scale * (U x) + bias; no bias is a null pointer."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = signed_sums(x, words, rows, R, P, tokens, stride, one, asm, BLOCK_R, BLOCK_P, M)
    acc *= tl.load(scale + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + rows, mask=rows < R, other=0.0).to(tl.float32)[:, None]
    m = tl.arange(0, M)
    inside = (m[None, :] < tokens) & (rows[:, None] < R)
    tl.store(out + m[None, :] * R + rows[:, None], acc.to(out.dtype.element_ty), mask=inside)
