"""The product with a packed weight and 8-bit activations on CPUs, by a compiled loop over packed signs."""

from __future__ import annotations

from torch import Tensor

from nanoquant_kernels import cpu
from nanoquant_kernels.cpu_build import PATHS, available_int8_paths, library

MOST_TOKENS = {"plain": 8}
"""Tokens up to which a path is faster than unpacking the signs once; others are so for any number."""


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled loop takes these arguments: few enough tokens, and dtypes that it knows."""
    paths = available_int8_paths()
    if not paths or any(t is not None and t.dtype not in cpu.TYPES for t in (x, *others)):
        return False
    most = MOST_TOKENS.get(paths[-1])
    return most is None or x.numel() <= most * x.shape[-1]


def binary_low_rank_linear_int8(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
    path: str | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.int8_reference.binary_low_rank_linear_int8`, up to the order of float32 sums.

    Args:
        x: (..., d_in), see :func:`serves`.
        u_signs: uint8 (d_out, ceil(rank / 8)).
        v_signs: uint8 (rank, ceil(d_in / 8)).
        s1: (d_out,).
        s2: (d_in,).
        bias: (d_out,) or None.
        rank: r.
        path: name of an instruction path of this machine; none means the fastest.
    """
    number = PATHS.index(path or available_int8_paths()[-1])
    return cpu.run(library().nq_linear_int8, number, x, u_signs, v_signs, s1, s2, bias, rank)
