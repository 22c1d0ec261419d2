"""BinaryLowRankLinear: a linear layer whose weight is s1 (U V^T) s2 with U and V in {-1, +1}."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanoquant.binary import BinaryFactors, straight_through_sign
from nanoquant.budget import layer_bits
from nanoquant_kernels import pack_signs, unpack_signs


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else that of the input."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class PackedSignProduct(torch.autograd.Function):
    """U (V^T x) of packed signs; nothing unpacked lives between forward and backward, which unpacks again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, u_signs: Tensor, v_signs: Tensor
    ) -> Tensor:
        """(..., d_in) to (..., d_out), in the dtype of ``x``; signs as of :class:`BinaryLowRankLinear`."""
        ctx.save_for_backward(u_signs, v_signs)
        ctx.d_in = x.shape[-1]
        V_rows = unpack_signs(v_signs, x.shape[-1], x.dtype)  # (r, d_in)
        z = F.linear(x, V_rows)  # (..., r)
        return F.linear(z, unpack_signs(u_signs, len(v_signs), x.dtype))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        """Gradient for ``x``; signs have none."""
        u_signs, v_signs = ctx.saved_tensors
        z = grad @ unpack_signs(u_signs, len(v_signs), grad.dtype)  # (..., r)
        return z @ unpack_signs(v_signs, ctx.d_in, grad.dtype), None, None


class BinaryLowRankLinear(nn.Module):
    r"""Linear layer :math:`y = s_1 \odot (U (V^\top (s_2 \odot x))) + b` (NanoQuant, arXiv 2602.06694, Eq. 1).

    Latent state: ``U`` (d_out, r) and ``V`` (d_in, r) are float32 parameters; the forward pass uses their signs
    and the backward pass goes straight through (Eq. 10). Frozen state, after :meth:`freeze`: in their place are
    buffers of a bit a sign, ``u_signs`` uint8 (d_out, ceil(r / 8)) and ``v_signs`` uint8 (r, ceil(d_in / 8)) as in
    :class:`PackedBinaryLinear`, and only scales and bias may train. Matrix products run in the input's dtype or in
    autocast's.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: number of sign columns r.
        bias: whether a bias (d_out,) is added.
        device: where the parameters live.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, rank) < 1:
            raise ValueError(
                f"in_features, out_features and rank must be at least 1, got {in_features}, {out_features}, {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device))
        self.V = nn.Parameter(torch.empty(in_features, rank, device=device))
        self.s1 = nn.Parameter(torch.empty(out_features, device=device))
        self.s2 = nn.Parameter(torch.empty(in_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random latents, and scales that keep the variance of the input."""
        nn.init.normal_(self.U)
        nn.init.normal_(self.V)
        nn.init.constant_(self.s1, self.rank**-0.5)
        nn.init.constant_(self.s2, self.in_features**-0.5)

    @classmethod
    def from_factors(
        cls, factors: BinaryFactors, bias: Tensor | None = None
    ) -> BinaryLowRankLinear:
        """Build a latent layer from factors of one matrix; tensors are copied as float32."""
        layer = cls(
            factors.V.shape[0], factors.U.shape[0], factors.rank, bias is not None, factors.U.device
        )
        with torch.no_grad():
            for name in ("U", "V", "s1", "s2"):
                getattr(layer, name).copy_(getattr(factors, name))
            if bias is not None:
                layer.bias.copy_(bias)
        return layer

    @property
    def frozen(self) -> bool:
        """True once the signs are fixed."""
        return "U" not in self._parameters

    @property
    def bits(self) -> int:
        """Bits that the packed layer stores for signs and scales, without the bias."""
        return layer_bits(self.out_features, self.in_features, self.rank)

    def vectors(self) -> list[nn.Parameter]:
        """Scales and bias."""
        return [tensor for tensor in (self.s1, self.s2, self.bias) if tensor is not None]

    def latents(self) -> list[nn.Parameter]:
        """U and V; none once the signs are fixed."""
        return [] if self.frozen else [self.U, self.V]

    def codebooks(self) -> list[nn.Parameter]:
        """None: signs are not looked up."""
        return []

    def freeze(self) -> BinaryLowRankLinear:
        """Fix the signs: latents become packed buffers; scales and bias stay parameters."""
        if not self.frozen:
            signs = {
                "u_signs": pack_signs(self.U.detach()),
                "v_signs": pack_signs(self.V.detach().mT),
            }
            del self.U, self.V
            for name, packed in signs.items():
                self.register_buffer(name, packed)
        return self

    def thaw(self) -> BinaryLowRankLinear:
        """Make the signs trainable again, as latents of magnitude exactly 1.

        How sure each sign was is lost with :meth:`freeze`: none flips before steps add up to 1. To train
        signs later, keep the layer latent.
        """
        if self.frozen:
            U, V = self._latents()
            del self.u_signs, self.v_signs
            self.U, self.V = nn.Parameter(U), nn.Parameter(V)
        return self

    def factors(self) -> BinaryFactors:
        """Float32 copies of latents (or signs) and scales, detached."""
        scales = (scale.detach().float().clone() for scale in (self.s1, self.s2))
        return BinaryFactors(*self._latents(), *scales)

    def _latents(self) -> tuple[Tensor, Tensor]:
        """Float32 copies of U and V, of their signs where they are frozen."""
        if not self.frozen:
            return self.U.detach().float().clone(), self.V.detach().float().clone()
        V_rows = unpack_signs(self.v_signs, self.in_features, torch.float32)
        U = unpack_signs(self.u_signs, self.rank, torch.float32)
        return U.contiguous(), V_rows.mT.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d_in), giving (..., d_out) in the compute dtype."""
        dtype = _compute_dtype(x)
        x = x.to(dtype) * self.s2.to(dtype)
        if self.frozen:
            y = PackedSignProduct.apply(x, self.u_signs, self.v_signs)
        else:
            U, V = (straight_through_sign(factor, dtype) for factor in (self.U, self.V))
            y = F.linear(x @ V, U)
        y = y * self.s1.to(dtype)  # (..., d_out), Eq. (1)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Shape, rank, bits per weight and state."""
        bits = self.bits / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, bits={bits:.3f}, {'frozen' if self.frozen else 'latent'}"
        )
