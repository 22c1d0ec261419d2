"""PackedProductLinear: the looked-up layer as checkpoints hold it; packed indices, codebooks, scales and bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nanoquant.codebooks import ProductFactors
from nanoquant.packed_linear import frozen
from nanoquant.product_budget import ProductShape
from nanoquant_kernels import pack_indices, product_linear
from nanoquant_kernels.indices import index_bytes
from nanoquant_kernels.product import dequantize

if TYPE_CHECKING:
    from nanoquant.product_tensor import PackedProductTensor

PARTS = ("indices", "codebook", "indices2", "codebook2", "scale")
"""Stored tensors in the order of the operator; those of a second stage may be None."""


class PackedProductLinear(nn.Module):
    """Linear layer whose row i is scale_i times groups of codebook entries, see :mod:`nanoquant.codebooks`.

    All tensors are parameters without gradient: ``indices`` uint8 (d_out, bytes), ``codebook`` (R, K, g), the same of a
    residual stage as ``indices2`` and ``codebook2`` or None, ``scale`` (d_out,) and ``bias`` (d_out,) or None.
    Codebooks, scales and bias may be made trainable with ``requires_grad_``. A new layer holds zeros.

    Args:
        in_features: d_in.
        out_features: d_out.
        shape: group, widths and slabs.
        bias: whether a bias is added.
        device: where the tensors live.
        dtype: of codebooks and scales.
        bias_dtype: dtype of the bias; None means torch's default dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shape: ProductShape,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"in_features and out_features must be at least 1, got {in_features}, {out_features}"
            )
        shape.check(out_features, in_features)
        self.in_features, self.out_features, self.shape = in_features, out_features, shape
        self.indices2 = self.codebook2 = None
        for end, width in zip(("", "2"), shape.widths, strict=False):
            size = index_bytes(shape.groups(in_features), width)
            indices = torch.zeros(out_features, size, dtype=torch.uint8, device=device)
            book = torch.zeros(shape.slabs, 2**width, shape.group, dtype=dtype, device=device)
            setattr(self, f"indices{end}", frozen(indices))
            setattr(self, f"codebook{end}", frozen(book))
        self.scale = frozen(torch.zeros(out_features, dtype=dtype, device=device))
        self.bias = (
            frozen(torch.zeros(out_features, dtype=bias_dtype, device=device)) if bias else None
        )

    @classmethod
    def from_factors(
        cls,
        factors: ProductFactors,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> PackedProductLinear:
        """Pack the indices of ``factors`` of one matrix and round codebooks and scales to ``dtype``.

        Raises:
            ValueError: a codebook, a scale or the bias is not finite, or one overflows ``dtype``.
        """
        return cls._from_tensors(pack_product(factors, dtype), factors.d_in, bias)

    @classmethod
    def from_weight(
        cls, weight: PackedProductTensor, bias: Tensor | None = None
    ) -> PackedProductLinear:
        """Carry the tensors of a packed weight, without a copy."""
        return cls._from_tensors(weight.parts(), weight.d_in, bias)

    @classmethod
    def _from_tensors(
        cls, parts: dict[str, Tensor | None], d_in: int, bias: Tensor | None
    ) -> PackedProductLinear:
        """A layer that holds exactly these tensors."""
        if bias is not None and not bias.isfinite().all():
            raise ValueError("bias holds a value that is not finite; the layer can't be packed")
        books = [parts[name] for name in ("codebook", "codebook2") if parts[name] is not None]
        slabs, _, group = books[0].shape
        shape = ProductShape(group, tuple(C.shape[1].bit_length() - 1 for C in books), slabs)
        layer = cls(d_in, len(parts["scale"]), shape, bias is not None, "meta", books[0].dtype)
        for name, tensor in (parts | {"bias": bias}).items():
            if tensor is not None:
                setattr(layer, name, frozen(tensor.detach()))
        return layer

    @property
    def weight(self) -> PackedProductTensor:
        """The weight as a torchao tensor over the same storage; its dtype is that of the scales."""
        from nanoquant.product_tensor import PackedProductTensor  # it builds on this file

        return PackedProductTensor(
            *(self.indices, self.codebook, self.scale, self.in_features, self.scale.dtype),
            *(self.indices2, self.codebook2),
        )

    @property
    def bits(self) -> int:
        """Bits of the stored indices, codebooks and scales, without the bias."""
        stored = [t for t in self.operands()[:-1] if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in stored)

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in), in the dtype of the scales."""
        return dequantize(*self.operands()[:-1], self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d_in), giving (..., d_out) in the dtype of ``x``."""
        return product_linear(x, *self.operands())

    def operands(self) -> tuple[Tensor | None, ...]:
        """What the operator takes after x."""
        return *(getattr(self, name) for name in PARTS), self.bias

    def extra_repr(self) -> str:
        """Shape, look-ups and bits per weight."""
        bits = self.bits / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, codebooks={self.shape}, "
            f"bias={self.bias is not None}, bits={bits:.3f}"
        )


def pack_product(factors: ProductFactors, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Stored tensors by name of the factors of one matrix; codebooks and scales are copies in ``dtype``.

    Raises:
        ValueError: a codebook or a scale is not finite, in its own dtype or in ``dtype``.
    """
    parts: dict[str, Tensor | None] = dict.fromkeys(PARTS)
    for end, k, C in zip(("", "2"), factors.indices, factors.codebooks, strict=False):
        parts[f"indices{end}"] = pack_indices(k, C.shape[-2].bit_length() - 1)
        parts[f"codebook{end}"] = C
    parts["scale"] = factors.scale
    for name in ("codebook", "codebook2", "scale"):
        if (real := parts[name]) is None:
            continue
        if not real.isfinite().all():
            raise ValueError(f"{name} holds a value that is not finite; the layer can't be packed")
        parts[name] = real.detach().to(dtype, copy=True)
        if not parts[name].isfinite().all():
            raise ValueError(f"{name} overflows {dtype}; choose a dtype of wider range")
    return parts
