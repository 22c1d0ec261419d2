"""Operators for linears whose weight is a product of two sign matrices or looked up; no models, no files."""

from nanoquant_kernels.indices import pack_indices, unpack_indices
from nanoquant_kernels.layout import pack_signs, packed_width, unpack_signs
from nanoquant_kernels.ops import binary_low_rank_linear
from nanoquant_kernels.ops_int8 import binary_low_rank_linear_int8
from nanoquant_kernels.ops_product import product_linear
from nanoquant_kernels.ops_stack import binary_low_rank_linears
from nanoquant_kernels.table import pack_codes, table_rows, unpack_codes
from nanoquant_kernels.table_ops import table_linear

__all__ = [
    "binary_low_rank_linear",
    "binary_low_rank_linear_int8",
    "binary_low_rank_linears",
    "pack_codes",
    "pack_indices",
    "pack_signs",
    "packed_width",
    "product_linear",
    "table_linear",
    "table_rows",
    "unpack_codes",
    "unpack_indices",
    "unpack_signs",
]
