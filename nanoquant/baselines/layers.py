"""Linears of signs and scales that the factors of NanoQuant can't express.

Signs take one stored bit, scales are bfloat16, all are parameters without gradient. Shapes: W (d_out, d_in), rank r.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanoquant.packed_linear import frozen
from nanoquant_kernels import pack_signs, unpack_signs

SCALE_DTYPE = torch.bfloat16


class SignLinear(nn.Module):
    """W ~ diag(rows) B diag(columns), B = sign(W): one bit a weight.

    Args:
        weight: (d_out, d_in), whose signs count.
        rows: (d_out,).
        columns: (d_in,), or none for scales of rows alone.
        bias: (d_out,) or none.
    """

    def __init__(
        self, weight: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self.signs = frozen(pack_signs(weight.detach()))  # (d_out, ceil(d_in / 8))
        self.rows = frozen(rows.to(SCALE_DTYPE))
        self.columns = None if columns is None else frozen(columns.to(SCALE_DTYPE))
        self.bias = None if bias is None else frozen(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d_in), giving (..., d_out) in the dtype of ``x``."""
        if self.columns is not None:
            x = x * self.columns.to(x.dtype)
        y = F.linear(x, unpack_signs(self.signs, self.in_features, x.dtype))
        y = y * self.rows.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in), float32."""
        weight = unpack_signs(self.signs, self.in_features, torch.float32)
        weight = weight * self.rows.float().unsqueeze(-1)
        return weight if self.columns is None else weight * self.columns.float()


class MiddleScaleLinear(nn.Module):
    """W ~ diag(s1) U diag(middle) V^T diag(s2): the form of LittleBit and DBF, one scale more a rank.

    Args:
        U: (d_out, r), whose signs count.
        V: (d_in, r), whose signs count.
        s1: (d_out,).
        middle: (r,).
        s2: (d_in,).
        bias: (d_out,) or none.
    """

    def __init__(
        self, U: Tensor, V: Tensor, s1: Tensor, middle: Tensor, s2: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.in_features, self.rank = V.shape
        self.u_signs = frozen(pack_signs(U.detach()))  # (d_out, ceil(r / 8))
        self.v_signs = frozen(pack_signs(V.detach().mT))  # (r, ceil(d_in / 8))
        self.s1, self.middle, self.s2 = (frozen(s.to(SCALE_DTYPE)) for s in (s1, middle, s2))
        self.bias = None if bias is None else frozen(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d_in), giving (..., d_out) in the dtype of ``x``."""
        V = unpack_signs(self.v_signs, self.in_features, x.dtype)  # (r, d_in)
        z = F.linear(x * self.s2.to(x.dtype), V) * self.middle.to(x.dtype)  # (..., r)
        y = F.linear(z, unpack_signs(self.u_signs, self.rank, x.dtype)) * self.s1.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in), float32."""
        U = unpack_signs(self.u_signs, self.rank, torch.float32) * self.s1.float().unsqueeze(-1)
        V = unpack_signs(self.v_signs, self.in_features, torch.float32) * self.s2.float()
        return (U * self.middle.float()) @ V
