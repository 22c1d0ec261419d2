"""PackedProductTensor: packed indices, codebooks and scales behind a (d_out, d_in) weight, for torchao."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from nanoquant.codebooks import ProductFactors
from nanoquant.packed_weight import PackedWeight
from nanoquant.product_packed import PARTS, pack_product
from nanoquant_kernels import product_linear
from nanoquant_kernels.indices import index_bytes
from nanoquant_kernels.product import dequantize, stages_of


class PackedProductTensor(PackedWeight):
    """Weight whose rows are scales times groups of codebook entries, see :mod:`nanoquant.codebooks`.

    ``F.linear`` computes with the packed form; ``dequantize`` gives the dense weight. ``.to(dtype)`` casts codebooks
    and scales together with the dtype that the tensor shows, as it would cast a dense weight; the indices stay.
    ``torch.load(file, weights_only=True)`` knows this class once it has been imported.

    Args:
        indices: uint8 (d_out, bytes) of the first stage, the field ``indices1``.
        codebook: (R, K, g) of the first stage.
        scale: (d_out,).
        d_in: columns.
        dtype: the dtype that the tensor shows.
        indices2: of the second stage, or None.
        codebook2: of the second stage, or None.
    """

    # "indices" is a method of torch.Tensor, and torch.export does not see fields of such names
    tensor_data_names = ["indices1", "codebook", "scale"]
    tensor_attribute_names = ["d_in", "dtype"]
    optional_tensor_data_names = ["indices2", "codebook2"]
    gathered_parts = PARTS  # of a codebook too: each then serves the rows of its process

    @staticmethod
    def __new__(
        cls: type,
        indices: Tensor,
        codebook: Tensor,
        scale: Tensor,
        d_in: int,
        dtype: torch.dtype,
        indices2: Tensor | None = None,
        codebook2: Tensor | None = None,
    ) -> PackedProductTensor:
        """Make the wrapper: the outer shape, dtype and device without storage."""
        shape = (scale.shape[0], d_in)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=indices.device)

    def __init__(
        self,
        indices: Tensor,
        codebook: Tensor,
        scale: Tensor,
        d_in: int,
        dtype: torch.dtype,
        indices2: Tensor | None = None,
        codebook2: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.indices1, self.codebook, self.scale, self.d_in = indices, codebook, scale, d_in
        self.indices2, self.codebook2 = indices2, codebook2

    @classmethod
    def from_factors(
        cls,
        factors: ProductFactors,
        stored: torch.dtype = torch.bfloat16,
        dtype: torch.dtype | None = None,
    ) -> PackedProductTensor:
        """Pack the indices of ``factors`` of one matrix.

        Args:
            factors: of one matrix.
            stored: codebooks and scales are rounded to it.
            dtype: what the tensor shows; none means ``stored``.

        Raises:
            ValueError: a codebook or a scale is not finite, or overflows ``stored``.
        """
        return cls._from_parts(pack_product(factors, stored), factors.d_in, dtype or stored)

    @classmethod
    def _from_parts(
        cls, parts: dict[str, Tensor | None], d_in: int, dtype: torch.dtype
    ) -> PackedProductTensor:
        """A tensor of these parts by name."""
        required = (parts[name] for name in ("indices", "codebook", "scale"))
        return cls(*required, d_in, dtype, parts["indices2"], parts["codebook2"])

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in) in the dtype that the tensor shows."""
        return dequantize(*self.parts().values(), self.d_in).to(self.dtype)

    def parts(self) -> dict[str, Tensor | None]:
        """The stored tensors by name, in the order of the operator."""
        stored = (self.indices1, self.codebook, self.indices2, self.codebook2, self.scale)
        return dict(zip(PARTS, stored, strict=True))

    def mapped(
        self, function: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedProductTensor:
        """The same with every stored tensor replaced by ``function`` of its name and value."""
        parts = {n: None if t is None else function(n, t) for n, t in self.parts().items()}
        return self._from_parts(parts, self.d_in, dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of x (..., d_in) with the weight: (..., d_out) in the dtype of ``x``."""
        return product_linear(x, *self.parts().values(), bias)

    @property
    def column_step(self) -> int:
        """Columns of as many groups as fill whole bytes of the indices of each stage."""
        widths = [stage.width for stage in stages_of(*list(self.parts().values())[:4])]
        return self.codebook.shape[2] * max(8 // gcd(8, width) for width in widths)

    def rows(self, start: int, stop: int) -> PackedProductTensor:
        """Rows ``start`` to ``stop``, sharing the stored tensors, codebooks of whole ranges of rows or of one.

        Raises:
            ValueError: the rows begin or end within several such ranges.
        """
        d_out, slabs = self.shape[0], len(self.codebook)
        size = max(1, d_out // slabs)
        first, last = start // size, max(start, stop - 1) // size
        if last > first and (start % size or stop % size):
            raise ValueError(
                f"got rows {start}:{stop} of a {type(self).__name__} of shape {tuple(self.shape)}, whose codebooks "
                f"serve {size} rows each; cut at multiples of {size} or between two of them, or cut its dequantize()"
            )
        books = slice(min(first, slabs - 1), last + 1)
        return self.mapped(lambda name, t: t[books] if "codebook" in name else t[start:stop])

    def byte_columns(self, start: int, stop: int) -> PackedProductTensor:
        """Columns ``start`` to ``stop``, both multiples of :attr:`column_step` or at the end."""
        parts, g = self.parts(), self.codebook.shape[2]
        for indices, book in (("indices", self.codebook), ("indices2", self.codebook2)):
            if book is not None:
                width = book.shape[1].bit_length() - 1
                ends = (index_bytes(-(-column // g), width) for column in (start, stop))
                parts[indices] = parts[indices][:, slice(*ends)]
        return self._from_parts(parts, stop - start, self.dtype)

    def __repr__(self) -> str:
        """Shape, codebooks and bits per weight; never the values."""
        books = [tuple(C.shape) for C in (self.codebook, self.codebook2) if C is not None]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, codebooks={books}, "
            f"bits={self.bits / max(1, self.numel()):.3f}, dtype={self.dtype}, device={self.device})"
        )


torch.serialization.add_safe_globals([PackedProductTensor])
