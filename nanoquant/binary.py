"""Signs, their straight-through gradient, the rank-one magnitude step, and the factors W ~ s1 U V^T s2.

Shapes, everywhere in this package: W (d_out, d_in), U (d_out, r), V (d_in, r), s1 (d_out,), s2 (d_in,);
leading batch dimensions are allowed. Equation numbers are those of the NanoQuant paper (arXiv 2602.06694).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """Signs in {-1, +1}, +1 for 0, in the dtype of ``x``; adding 0.0 turns -0.0 into +0.0."""
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x + 0.0)


class StraightThroughSign(torch.autograd.Function):
    """sign(x) forward, identity backward (Eq. 10); exact for any magnitude, unlike (y - x).detach() + x.

    It takes nothing but ``x``: compiled by torch 2.11, a function with another argument loses its gradient.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        """Return the signs of ``x`` in its dtype."""
        return sign(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        """Pass the gradient through."""
        return grad


def straight_through_sign(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Signs of ``x`` in ``dtype``; the gradient comes back in the dtype of ``x``."""
    if (
        dtype is torch.bfloat16
    ):  # it has the range of float32, so the cheaper order keeps every sign
        return StraightThroughSign.apply(x.to(dtype))
    return StraightThroughSign.apply(x).to(dtype)


def rank_one(P: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Best rank-one approximation a b^T of a non-negative P by power iteration.

    Args:
        P: (..., m, n), entries >= 0.
        iterations: number of power iterations; the published code uses 5.

    Returns:
        a (..., m) and b (..., n), b of unit norm.
    """
    tiny = torch.finfo(P.dtype).tiny
    a = P.sum(-1)  # a step from all ones: positive, so never orthogonal to the leading pair
    for _ in range(iterations):
        a = a / a.norm(dim=-1, keepdim=True).clamp_min(tiny)
        b = (a.unsqueeze(-2) @ P).squeeze(-2)
        b = b / b.norm(dim=-1, keepdim=True).clamp_min(tiny)
        a = (P @ b.unsqueeze(-1)).squeeze(-1)
    return a, b


def svid(P: Tensor, iterations: int) -> Tensor:
    """Sign-value independent decomposition sign(P) * rank_one(|P|), (..., m, n) to (..., m, n) (Eq. 6)."""
    a, b = rank_one(P.abs(), iterations)
    return torch.copysign(a.unsqueeze(-1) * b.unsqueeze(-2), P + 0.0)


@dataclass(frozen=True)
class BinaryFactors:
    """W ~ diag(s1) sign(U) sign(V)^T diag(s2) (Eq. 1); U and V are float32 latents whose signs count.

    U: (..., d_out, r); V: (..., d_in, r); s1: (..., d_out); s2: (..., d_in).
    """

    U: Tensor
    V: Tensor
    s1: Tensor
    s2: Tensor

    @property
    def rank(self) -> int:
        """Number of sign columns r."""
        return self.U.shape[-1]

    def dense(self) -> Tensor:
        """Reconstruct W, (..., d_out, d_in), in the dtype of the latents."""
        product = sign(self.U) @ sign(self.V).mT
        return self.s1.unsqueeze(-1) * product * self.s2.unsqueeze(-2)  # Eq. (1)

    def normalized(self) -> BinaryFactors:
        """Scale each latent matrix to mean magnitude 1, so that one learning rate suits every layer."""
        U, V = (x / x.abs().mean(dim=(-2, -1), keepdim=True) for x in (self.U, self.V))
        return BinaryFactors(U, V, self.s1, self.s2)

    def unbind(self) -> list[BinaryFactors]:
        """Split a batch of factors along its first dimension."""
        return [
            BinaryFactors(*parts) for parts in zip(self.U, self.V, self.s1, self.s2, strict=True)
        ]


def relative_error(W: Tensor, approximation: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Weighted relative squared error sum w (W - A)^2 / sum w W^2 over the last two dimensions."""
    error = (weight * (W - approximation).square()).sum(dim=(-2, -1))
    return error / (weight * W.square()).sum(dim=(-2, -1))
