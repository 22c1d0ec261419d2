"""PackedBinaryLinear: the layer that checkpoints hold; uint8 tensors of signs, scales and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nanoquant.binary import BinaryFactors
from nanoquant.linear import BinaryLowRankLinear
from nanoquant_kernels import (
    binary_low_rank_linear,
    binary_low_rank_linear_int8,
    pack_signs,
    packed_width,
    unpack_signs,
)
from nanoquant_kernels.layout import align_rows

if TYPE_CHECKING:
    from nanoquant.packed_tensor import PackedBinaryTensor
    from nanoquant.shared_launch import SharedLaunch


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that does not train: FSDP shards no buffers, and DDP resends them each step."""
    return nn.Parameter(tensor, requires_grad=False)


class PackedBinaryLinear(nn.Module):
    r"""Linear layer :math:`y = s_1 \odot (U (V^\top (s_2 \odot x))) + b` over packed signs (Eq. 1).

    All tensors are parameters without gradient: ``u_signs`` uint8 (d_out, ceil(r / 8)), ``v_signs``
    uint8 (r, ceil(d_in / 8)), whose row k is column k of V, ``s1`` (d_out,), ``s2`` (d_in,) and
    ``bias`` (d_out,) or None. Scales and bias may be made trainable with ``requires_grad_``. A new
    layer holds +1 signs and zero scales.

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: number of sign columns r.
        bias: whether a bias is added.
        device: where the tensors live.
        scale_dtype: dtype of ``s1`` and ``s2``.
        bias_dtype: dtype of the bias; None means torch's default dtype.
    """

    shared: SharedLaunch | None = None
    """Launch that this layer shares with others that read the same tensor."""
    traced = False
    """Whether such others were looked for."""
    int8_activations = False
    """Whether inputs are rounded to 8 bits, on CPUs alone; :mod:`nanoquant.int8_activations` sets it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, rank) < 1:
            raise ValueError(
                "in_features, out_features and rank must be at least 1, got "
                f"{in_features}, {out_features}, {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        signs = {"dtype": torch.uint8, "device": device}
        scales = {"dtype": scale_dtype, "device": device}
        self.u_signs = frozen(torch.zeros(out_features, packed_width(rank), **signs))
        self.v_signs = frozen(torch.zeros(rank, packed_width(in_features), **signs))
        self.s1 = frozen(torch.zeros(out_features, **scales))
        self.s2 = frozen(torch.zeros(in_features, **scales))
        self.bias = (
            frozen(torch.zeros(out_features, dtype=bias_dtype, device=device)) if bias else None
        )

    @classmethod
    def from_factors(
        cls,
        factors: BinaryFactors,
        bias: Tensor | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> PackedBinaryLinear:
        """Pack the signs of ``factors`` of one matrix and round the scales to ``scale_dtype``.

        Raises:
            ValueError: a scale or the bias is not finite, or a scale overflows ``scale_dtype``.
        """
        return cls._from_tensors(*pack_factors(factors, scale_dtype), bias, factors.rank)

    @classmethod
    def from_frozen(
        cls,
        layer: BinaryLowRankLinear,
        bias: Tensor | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> PackedBinaryLinear:
        """Carry the signs of a frozen layer, without a copy; the rest as of :meth:`from_factors`."""
        scales = round_scales(layer.s1, layer.s2, scale_dtype)
        return cls._from_tensors(layer.u_signs, layer.v_signs, *scales, bias, layer.rank)

    @classmethod
    def from_weight(
        cls, weight: PackedBinaryTensor, bias: Tensor | None = None
    ) -> PackedBinaryLinear:
        """Carry the tensors of a packed weight, without a copy."""
        return cls._from_tensors(
            weight.u_signs, weight.v_signs, weight.s1, weight.s2, bias, weight.rank
        )

    @classmethod
    def _from_tensors(
        cls,
        u_signs: Tensor,
        v_signs: Tensor,
        s1: Tensor,
        s2: Tensor,
        bias: Tensor | None,
        rank: int,
    ) -> PackedBinaryLinear:
        """A layer that holds exactly these tensors."""
        if bias is not None and not bias.isfinite().all():
            raise ValueError("bias holds a value that is not finite; the layer can't be packed")
        layer = cls(s2.shape[0], s1.shape[0], rank, bias is not None, "meta", s1.dtype)
        layer.u_signs, layer.v_signs = frozen(u_signs.detach()), frozen(v_signs.detach())
        layer.s1, layer.s2 = frozen(s1.detach()), frozen(s2.detach())
        layer.bias = None if bias is None else frozen(bias.detach())
        return layer

    @property
    def weight(self) -> PackedBinaryTensor:
        """The weight as a torchao tensor over the same storage; its dtype is that of the scales."""
        from nanoquant.packed_tensor import PackedBinaryTensor  # it builds on this file

        return PackedBinaryTensor(
            self.u_signs, self.v_signs, self.s1, self.s2, self.rank, self.s1.dtype
        )

    @property
    def bits(self) -> int:
        """Bits of the stored signs and scales, without the bias."""
        return 8 * sum(
            t.numel() * t.element_size() for t in (self.u_signs, self.v_signs, self.s1, self.s2)
        )

    def dequantize(self) -> Tensor:
        """The dense weight s1 U V^T s2, (d_out, d_in), in the dtype of the scales."""
        return dequantize(self.u_signs, self.v_signs, self.s1, self.s2, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d_in), giving (..., d_out) in the dtype of ``x``."""
        if self.int8_activations and x.device.type == "cpu":
            return binary_low_rank_linear_int8(x, *self.operands())
        if self.shared is not None and self.shared.serves(self, x):
            return self.shared(self, x)
        return binary_low_rank_linear(x, *self.operands())

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
        """What the operators take after x."""
        return self.u_signs, self.v_signs, self.s1, self.s2, self.bias, self.rank

    def align_rows_(self) -> None:
        """Pad the distance of packed rows to what a GPU loads at once; values and shapes stay the same."""
        for signs in (self.u_signs, self.v_signs):
            if (aligned := align_rows(signs.data)) is not signs.data:
                signs.data = aligned

    def extra_repr(self) -> str:
        """Shape, rank and bits per weight."""
        bits = self.bits / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, bits={bits:.3f}"
        )


def pack_factors(
    factors: BinaryFactors, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed tensors u_signs, v_signs, s1, s2 of the factors of one matrix.

    Raises:
        ValueError: a latent or a scale is not finite, in its own dtype or in ``scale_dtype``.
    """
    for name in ("U", "V"):
        if not getattr(factors, name).isfinite().all():
            raise ValueError(f"{name} holds a value that is not finite; the layer can't be packed")
    scales = round_scales(factors.s1, factors.s2, scale_dtype)
    return pack_signs(factors.U.detach()), pack_signs(factors.V.detach().mT), *scales


def round_scales(s1: Tensor, s2: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of the scales of one matrix in ``scale_dtype``.

    Raises:
        ValueError: a scale is not finite, in its own dtype or in ``scale_dtype``.
    """
    for name, scale in {"s1": s1, "s2": s2}.items():
        if not scale.isfinite().all():
            raise ValueError(f"{name} holds a value that is not finite; the layer can't be packed")
        if not scale.to(scale_dtype).isfinite().all():
            raise ValueError(f"{name} overflows {scale_dtype}; choose a scale dtype of wider range")
    return s1.detach().to(scale_dtype, copy=True), s2.detach().to(scale_dtype, copy=True)


def dequantize(u_signs: Tensor, v_signs: Tensor, s1: Tensor, s2: Tensor, rank: int) -> Tensor:
    """Dense weight (d_out, d_in) in the dtype of ``s1``, from exact float32 sums of signs."""
    U = unpack_signs(u_signs, rank, torch.float32)  # (d_out, r)
    V_rows = unpack_signs(v_signs, s2.shape[0], torch.float32)  # (r, d_in)
    return (s1.float().unsqueeze(-1) * (U @ V_rows) * s2.float()).to(s1.dtype)
