"""Packed layers of either method: what sizes and checkpoints ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.methods import Layer, Size, entry_of
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.product_budget import ProductShape
from nanoquant.product_linear import ProductQuantLinear
from nanoquant.product_packed import PackedProductLinear

Packed = PackedBinaryLinear | PackedProductLinear
"""A quantized linear as checkpoints hold it."""
SIGNS, SCALES = ("u_signs", "v_signs"), ("s1", "s2")
"""Stored tensors of binary factors: bytes, and numbers."""


def parts_of(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the stored tensors of a packed layer, besides its bias: bytes, and numbers of one dtype.

    Args:
        entry: its size as of ``methods.entry_of``.
    """
    if "rank" in entry:
        return SIGNS, SCALES
    ends = ("", "2")[: len(entry["widths"])]
    books = tuple(f"codebook{end}" for end in ends)
    return tuple(f"indices{end}" for end in ends), (*books, "scale")


def packed_size(packed: Packed) -> Size:
    """Rank, or shape of the codebooks."""
    return packed.shape if isinstance(packed, PackedProductLinear) else packed.rank


def packed_entry(packed: Packed) -> dict[str, Any]:
    """What ``config.json`` says of a layer."""
    return entry_of(packed_size(packed))


def pack_layer(layer: Layer, bias: Tensor | None, dtype: torch.dtype) -> Packed:
    """The packed form of a trained layer, with scales and codebooks in ``dtype``.

    Raises:
        ValueError: a value is not finite, or overflows ``dtype``.
    """
    if isinstance(layer, ProductQuantLinear):
        return PackedProductLinear.from_factors(layer.factors(), bias, dtype)
    if layer.frozen:
        return PackedBinaryLinear.from_frozen(layer, bias, dtype)
    return PackedBinaryLinear.from_factors(layer.factors(), bias, dtype)


def is_packed(weight: Tensor | None) -> bool:
    """Whether a weight is a ``PackedBinaryTensor`` or a ``PackedProductTensor``."""
    return hasattr(weight, "u_signs") or hasattr(weight, "codebook")


def from_packed_weight(weight: Tensor, bias: Tensor | None) -> Packed:
    """The packed layer over the tensors of such a weight."""
    kind = PackedBinaryLinear if hasattr(weight, "u_signs") else PackedProductLinear
    return kind.from_weight(weight, bias)


def empty_layer(
    d_out: int,
    d_in: int,
    size: Size,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> Packed:
    """A layer on the meta device.

    Args:
        d_out: outputs.
        d_in: inputs.
        size: rank, or shape of the codebooks.
        dtype: of scales and codebooks.
        bias_dtype: of the bias; None: there is none.

    Raises:
        ValueError: the codebooks don't fit the shape.
    """
    kind = PackedProductLinear if isinstance(size, ProductShape) else PackedBinaryLinear
    return kind(d_in, d_out, size, bias_dtype is not None, "meta", dtype, bias_dtype)


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """The packed layers of a model by full name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Packed)}
