"""The product with a product-quantized weight in plain PyTorch: the truth that every kernel is tested against.

Row i of the weight is scale[i] times G = ceil(d_in / g) groups of g entries, group j the row k of a codebook (K, g)
with k = indices[i, j], plus that of a second codebook where there is a second stage. Codebooks are (R, K, g), one for
each of R equal ranges of rows; K is a power of two, and packed indices take log2 K bits each, see
:mod:`nanoquant_kernels.indices`. Entries past column d_in mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanoquant_kernels.indices import unpack_indices

CHUNK = {"cpu": 2**21}
"""Weights that are made dense at a time: on a CPU what its cache holds."""
LARGE_CHUNK = 2**26
"""The same on other devices."""


class Stage(NamedTuple):
    """One look-up."""

    indices: Tensor
    """uint8 (d_out, bytes)."""
    codebook: Tensor
    """(R, K, g)."""

    @property
    def width(self) -> int:
        """Bits of an index."""
        return self.codebook.shape[1].bit_length() - 1

    def numbers(self, rows: range, d_out: int, d_in: int) -> Tensor:
        """Rows of the codebooks, laid out as (R K, g), that some rows of the weight take: int64 (n, G)."""
        R, K, g = self.codebook.shape
        k = unpack_indices(self.indices[rows.start : rows.stop], -(-d_in // g), self.width)
        slab = torch.arange(rows.start, rows.stop, device=k.device) // (d_out // R)
        return k.long() + K * slab.unsqueeze(-1)


def stages_of(
    indices: Tensor, codebook: Tensor, indices2: Tensor | None, codebook2: Tensor | None
) -> list[Stage]:
    """One stage or two."""
    first = Stage(indices, codebook)
    return [first] if indices2 is None else [first, Stage(indices2, codebook2)]


def chunks(stages: list[Stage], d_out: int, d_in: int) -> Iterator[range]:
    """Ranges of rows that may be dense at a time."""
    size = CHUNK.get(stages[0].indices.device.type, LARGE_CHUNK)
    step = max(1, size // max(1, d_in))
    return (range(first, min(first + step, d_out)) for first in range(0, d_out, step))


def looked_up(stages: list[Stage], numbers: list[Tensor], d_in: int, dtype: torch.dtype) -> Tensor:
    """Weight (n, d_in) of some rows without their scales, in ``dtype``, from the numbers of each stage."""
    total = sum(
        F.embedding(k, stage.codebook.to(dtype).flatten(0, 1))
        for stage, k in zip(stages, numbers, strict=True)
    )
    return total.flatten(-2)[:, :d_in]


def dequantize(
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    d_in: int,
) -> Tensor:
    """Dense weight (d_out, d_in) in the dtype of ``scale``, computed in float32 or better."""
    stages, d_out = stages_of(indices, codebook, indices2, codebook2), len(scale)
    dtype = torch.promote_types(scale.dtype, torch.float32)
    dense = scale.new_empty(d_out, d_in)
    for rows in chunks(stages, d_out, d_in):
        numbers = [stage.numbers(rows, d_out, d_in) for stage in stages]
        part = slice(rows.start, rows.stop)
        dense[part] = looked_up(stages, numbers, d_in, dtype) * scale[part].to(dtype).unsqueeze(-1)
    return dense


def product_linear(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Product of x (..., d_in) with the weight, in the dtype of ``x``: (..., d_out).

    Args:
        x: floating point.
        indices: uint8 (d_out, bytes) of the first stage.
        codebook: (R, K, g) of the first stage.
        indices2: of the second stage, or None.
        codebook2: of the second stage, or None.
        scale: (d_out,).
        bias: (d_out,) or None.
    """
    stages, d_out, d_in = stages_of(indices, codebook, indices2, codebook2), len(scale), x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty((*x.shape[:-1], d_out))
    for rows in chunks(stages, d_out, d_in):
        part = slice(rows.start, rows.stop)
        numbers = [stage.numbers(rows, d_out, d_in) for stage in stages]
        dense = looked_up(stages, numbers, d_in, dtype) * scale[part].to(dtype).unsqueeze(-1)
        y[..., part] = F.linear(
            x, dense.to(x.dtype), None if bias is None else bias[part].to(x.dtype)
        )
    return y


class Gradients(NamedTuple):
    """What :func:`product_linear_backward` gives, None where it was not wanted."""

    x: Tensor | None
    codebooks: list[Tensor]
    scale: Tensor


def product_linear_backward(
    grad: Tensor, x: Tensor, stages: list[Stage], scale: Tensor, needs_x: bool, needs_weight: bool
) -> Gradients:
    """Gradients of :func:`product_linear` at x, the codebooks and the scales, summed in float32 or better.

    Args:
        grad: (..., d_out), at the output.
        x: (..., d_in), as in the forward pass, like ``stages`` and ``scale``.
        stages: see ``x``.
        scale: see ``x``.
        needs_x: whether the gradient of x is wanted.
        needs_weight: whether those of codebooks and scales are; they are zero otherwise.
    """
    d_out, d_in = len(scale), x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad2, x2 = grad.reshape(-1, d_out), x.reshape(-1, d_in)
    books = [torch.zeros_like(s.codebook, dtype=dtype).flatten(0, 1) for s in stages]  # (R K, g)
    grad_scale = torch.zeros_like(scale, dtype=dtype)
    grad_x = torch.zeros_like(x2, dtype=dtype) if needs_x else None
    for rows in chunks(stages, d_out, d_in):
        part = slice(rows.start, rows.stop)
        numbers = [stage.numbers(rows, d_out, d_in) for stage in stages]
        values = looked_up(stages, numbers, d_in, dtype)  # (n, d_in)
        factor = scale[part].to(dtype).unsqueeze(-1)
        if needs_x:
            grad_x += grad2[:, part] @ (values * factor).to(grad.dtype)
        if needs_weight:
            grad_dense = (grad2[:, part].T @ x2.to(grad.dtype)).to(dtype)  # (n, d_in)
            grad_scale[part] = (grad_dense * values).sum(-1)
            for book, k in zip(books, numbers, strict=True):
                g = book.shape[1]
                padded = F.pad(grad_dense * factor, (0, k.shape[1] * g - d_in))
                # unlike index_add_ the same sum on every run, on a GPU too
                book.index_put_((k.flatten(),), padded.view(-1, g), accumulate=True)
    return Gradients(
        None if grad_x is None else grad_x.to(x.dtype).view_as(x),
        [
            book.view_as(stage.codebook).to(stage.codebook.dtype)
            for book, stage in zip(books, stages, strict=True)
        ],
        grad_scale.to(scale.dtype),
    )
