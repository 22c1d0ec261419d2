"""Tables of 8-bit or 4-bit codes (an embedding, a head) in plain PyTorch: layout, rows, product.

Entry (i, k) of a table (n, d) is ``scales[i, g] * (code[i, k] - zeros[i, g])`` with g = k // (d / G):

8 bits: codes int8 (n, d), scales (n, 1), no zeros: the codes are symmetric.
4 bits: codes uint8 (n, d / 2), scales (n, G), zeros int8 (n, G); a code is -8 to 7. Byte j of every 16 holds the codes
of columns j (low half) and j + 16 (high half) of 32, each with 8 added, so that 16 codes lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

COLUMNS = 32
"""Columns of a 4-bit table come in multiples of this, and so do its groups."""
CHUNK = {"cpu": 2**21}
"""Entries that a product with many tokens makes dense at a time: on a CPU what its cache holds."""
LARGE_CHUNK = 2**26
"""The same on other devices."""


def pack_codes(codes: Tensor) -> Tensor:
    """Pack int8 codes (n, d) from -8 to 7, d a multiple of 32, to uint8 (n, d / 2)."""
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, COLUMNS // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def unpack_codes(packed: Tensor) -> Tensor:
    """Undo :func:`pack_codes`."""
    halves = packed.unflatten(-1, (-1, COLUMNS // 2))
    return torch.stack((halves & 15, halves >> 4), dim=-2).flatten(-3).to(torch.int8) - 8


def dense_rows(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Dense entries (m, d) of rows of a table, computed in float32, in the dtype of ``scales``."""
    if codes.dtype == torch.uint8:
        codes = unpack_codes(codes)
    m, d = codes.shape
    values = codes.float().view(m, scales.shape[-1], d // scales.shape[-1])  # (m, G, d / G)
    if zeros is not None:
        values = values - zeros.float().unsqueeze(-1)
    return (values * scales.float().unsqueeze(-1)).flatten(-2).to(scales.dtype)


def table_rows(ids: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Rows of a table by their numbers: ids (...) to (..., d) in the dtype of ``scales``."""
    parts = [None if t is None else F.embedding(ids, t) for t in (codes, scales, zeros)]
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in parts]
    rows = dense_rows(*flat)
    return rows.view(*ids.shape, rows.shape[-1])


def chunks(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows with their dense entries, a bearable number at a time."""
    columns = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    step = max(1, CHUNK.get(codes.device.type, LARGE_CHUNK) // columns)
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        yield rows, dense_rows(codes[rows], scales[rows], None if zeros is None else zeros[rows])


def table_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Product of x (..., d) with a table (n, d): (..., n) in the dtype of ``x``."""
    y = x.new_empty((*x.shape[:-1], codes.shape[0]))
    for rows, dense in chunks(codes, scales, zeros):
        part = None if bias is None else bias[rows].to(x.dtype)
        y[..., rows] = F.linear(x, dense.to(x.dtype), part)
    return y


def table_linear_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None
) -> Tensor:
    """Gradient (..., d) at x of :func:`table_linear` from that at its result (..., n)."""
    parts = (grad[..., rows] @ dense.to(grad.dtype) for rows, dense in chunks(codes, scales, zeros))
    return sum(part.float() for part in parts).to(grad.dtype)
