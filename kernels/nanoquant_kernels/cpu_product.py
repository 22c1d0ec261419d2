"""The product with a looked-up weight on CPUs: a table of products for every group of inputs, for few tokens.

Accumulation is float32 whatever the dtype of x. The weight is never made dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels.cpu import TYPES
from nanoquant_kernels.cpu_build import PATHS, available_paths, library

MOST_TOKENS = 8
"""Tokens up to which tables are faster than making rows dense."""
LOOKUPS_A_THREAD = 2**16
"""Look-ups that are worth a thread of their own."""


def serves(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> bool:
    """Whether the compiled loop takes these arguments: few tokens, dtypes that it knows, tables that pay."""
    reals = (x, codebook, codebook2, scale, bias)
    if not available_paths() or any(t is not None and t.dtype not in TYPES for t in reals):
        return False
    if codebook2 is not None and codebook2.dtype != codebook.dtype:
        return False
    entries = codebook.shape[1] + (0 if codebook2 is None else codebook2.shape[1])
    pays = codebook.shape[0] * entries <= 2 * scale.shape[0]  # else tables cost more than rows
    return pays and x.numel() <= MOST_TOKENS * x.shape[-1]


def product_linear(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    path: str | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.product.product_linear`, by the compiled loop.

    Args:
        x: (..., d_in), see :func:`serves`.
        indices: uint8 (d_out, bytes) of the first stage.
        codebook: (R, K, g) of the first stage.
        indices2: of the second stage, or None.
        codebook2: of the second stage, or None, in the dtype of the first.
        scale: (d_out,).
        bias: (d_out,) or None.
        path: name of an instruction path of this machine; none means the fastest.
    """
    x, indices, codebook, scale = (t.contiguous() for t in (x, indices, codebook, scale))
    second = [None if t is None else t.contiguous() for t in (indices2, codebook2)]
    bias = None if bias is None else bias.contiguous()
    d_out, d_in = scale.shape[0], x.shape[-1]
    R, K, g = codebook.shape
    y = x.new_empty((*x.shape[:-1], d_out))
    tokens = x.numel() // d_in
    lookups = tokens * d_out * -(-d_in // g)
    threads = max(1, min(torch.get_num_threads(), lookups // LOOKUPS_A_THREAD))
    width2 = 0 if codebook2 is None else codebook2.shape[1].bit_length() - 1
    pointers = [None if t is None else t.data_ptr() for t in second]
    library().nq_product(
        *(x.data_ptr(), TYPES[x.dtype], tokens, d_in),
        *(indices.data_ptr(), K.bit_length() - 1, pointers[0], width2),
        *(codebook.data_ptr(), pointers[1], TYPES[codebook.dtype], R, g),
        *(scale.data_ptr(), TYPES[scale.dtype], d_out),
        *((None, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])),
        *(y.data_ptr(), PATHS.index(path or available_paths()[-1]), threads),
    )
    return y
