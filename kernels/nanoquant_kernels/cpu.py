"""The product with a packed weight on CPUs: a compiled loop over packed signs, for few enough tokens.

Accumulation is float32 whatever the dtype of x, and the latent between the two stages stays float32, so results are
closer to the truth than those of the reference in the dtype of x. The signs are never unpacked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanoquant_kernels.cpu_build import PATHS, available_paths, library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_TOKENS = {"plain": 4, "avx2": 32, "neon": 32, "avx512": 256}
"""Tokens up to which a path is faster than unpacking the signs once and multiplying densely."""
SIGNS_A_THREAD = 2**19
"""Signs times tokens that are worth a thread of their own."""


def exists() -> bool:
    """Whether the extension could be built and loaded."""
    return bool(available_paths())


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled loop takes these arguments: few tokens, and dtypes that it knows."""
    if not exists() or any(t is not None and t.dtype not in TYPES for t in (x, *others)):
        return False
    return x.numel() <= MOST_TOKENS[available_paths()[-1]] * x.shape[-1]


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
    path: str | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`, by the compiled loop.

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
    number = PATHS.index(path or available_paths()[-1])
    return run(library().nq_linear, number, x, u_signs, v_signs, s1, s2, bias, rank)


def run(
    linear: Callable[..., None],
    path_number: int,
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """Call a packed linear of the library; arguments as of :func:`binary_low_rank_linear`."""
    d_in, d_out = s2.shape[0], s1.shape[0]
    x, u_signs, v_signs = x.contiguous(), u_signs.contiguous(), v_signs.contiguous()
    s1, s2, bias = s1.contiguous(), s2.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], d_out))
    tokens = x.numel() // d_in
    work = tokens * rank * (d_in + d_out)
    threads = max(1, min(torch.get_num_threads(), work // SIGNS_A_THREAD))
    linear(
        *(x.data_ptr(), TYPES[x.dtype], tokens, d_in),
        *(v_signs.data_ptr(), s2.data_ptr(), TYPES[s2.dtype], rank),
        *(u_signs.data_ptr(), s1.data_ptr(), TYPES[s1.dtype], d_out),
        *((None, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])),
        *(y.data_ptr(), path_number, threads),
    )
    return y
