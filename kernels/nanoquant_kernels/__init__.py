"""Operators for linears whose weight is a product of two sign matrices; no models, no files."""

from nanoquant_kernels.layout import pack_signs, packed_width, unpack_signs
from nanoquant_kernels.ops import binary_low_rank_linear
from nanoquant_kernels.ops_stack import binary_low_rank_linears

__all__ = [
    "binary_low_rank_linear",
    "binary_low_rank_linears",
    "pack_signs",
    "packed_width",
    "unpack_signs",
]
