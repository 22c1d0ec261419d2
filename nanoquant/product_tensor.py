"""PackedProductTensor: packed indices, codebooks and scales behind a (d_out, d_in) weight, for torchao."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from nanoquant.codebooks import ProductFactors
from nanoquant.product_packed import PARTS, pack_product
from nanoquant_kernels import product_linear
from nanoquant_kernels.product import dequantize

aten = torch.ops.aten


class PackedProductTensor(TorchAOBaseTensor):
    """Weight whose rows are scales times groups of codebook entries, see :mod:`nanoquant.codebooks`.

    ``F.linear`` computes with the packed form; ``dequantize`` gives the dense weight. ``.to(dtype)`` casts codebooks
    and scales together with the dtype that the tensor shows, as it would cast a dense weight; the indices stay.
    ``torch.load(file, weights_only=True)`` knows this class once it has been imported.

    Args:
        indices: uint8 (d_out, bytes) of the first stage.
        codebook: (R, K, g) of the first stage.
        scale: (d_out,).
        d_in: columns.
        dtype: the dtype that the tensor shows.
        indices2: of the second stage, or None.
        codebook2: of the second stage, or None.
    """

    tensor_data_names = ["indices", "codebook", "scale"]
    tensor_attribute_names = ["d_in", "dtype"]
    optional_tensor_data_names = ["indices2", "codebook2"]
    _is_hf_initialized = True  # transformers initializes tensors without this mark at random

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
        self.indices, self.codebook, self.scale, self.d_in = indices, codebook, scale, d_in
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
        required = (parts[name] for name in cls.tensor_data_names)
        optional = (parts[name] for name in cls.optional_tensor_data_names)
        return cls(*required, d_in, dtype, *optional)

    @property
    def bits(self) -> int:
        """Bits of the stored indices, codebooks and scales."""
        stored = [t for t in self.parts().values() if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in stored)

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in) in the dtype that the tensor shows."""
        return dequantize(*self.parts().values(), self.d_in).to(self.dtype)

    def parts(self) -> dict[str, Tensor | None]:
        """The stored tensors by name, in the order of the operator."""
        return {name: getattr(self, name) for name in PARTS}

    def mapped(
        self, function: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedProductTensor:
        """The same with every stored tensor replaced by ``function`` of its name and value."""
        parts = {n: None if t is None else function(n, t) for n, t in self.parts().items()}
        return self._from_parts(parts, self.d_in, dtype or self.dtype)

    def _stable_hash_for_caching(self) -> str:
        """Key of torch.compile's cache: all that a compiled graph can depend on."""
        parts = [
            (name, None if t is None else (t.shape, t.stride(), t.dtype, t.device))
            for name, t in self.parts().items()
        ]
        key = repr((type(self).__qualname__, self.shape, self.dtype, self.requires_grad, parts))
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        """Shape, codebooks and bits per weight; never the values."""
        books = [tuple(C.shape) for C in (self.codebook, self.codebook2) if C is not None]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, codebooks={books}, "
            f"bits={self.bits / self.numel():.3f}, dtype={self.dtype}, device={self.device})"
        )


@PackedProductTensor.implements(aten.linear.default)
@PackedProductTensor.implements_torch_function(torch.nn.functional.linear)
def _linear(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """F.linear(x, weight, bias) through the packed operator."""
    return _apply(*args, **kwargs)


def _apply(input: Tensor, weight: PackedProductTensor, bias: Tensor | None = None) -> Tensor:
    """Spell out F.linear's arguments, which may come by name."""
    if not isinstance(weight, PackedProductTensor):
        raise ValueError(
            "a PackedProductTensor can be the weight of F.linear, not its input or bias"
        )
    return product_linear(input, *weight.parts().values(), bias)


@PackedProductTensor.implements(aten._to_copy.default)
def _to_copy(
    func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]
) -> PackedProductTensor:
    """Move or cast; torchao's own version drops the dtype without a word."""
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    device, dtype, non_blocking = to["device"], to["dtype"], to["non_blocking"]
    if not dtype.is_floating_point:
        raise ValueError(
            f"a PackedProductTensor can be cast to floating point dtypes only, got {dtype}"
        )
    cast = None if dtype == self.dtype else dtype  # a move alone leaves what is stored as it is

    def moved(name: str, part: Tensor) -> Tensor:
        return part.to(device, None if "indices" in name else cast, non_blocking=non_blocking)

    return return_and_correct_aliasing(func, args, kwargs, self.mapped(moved, dtype))


@PackedProductTensor.implements(aten.empty_like.default)
def _empty_like(
    func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]
) -> PackedProductTensor:
    """Uninitialized tensor of the same packed shapes, as ``nn.Module.to_empty`` asks for."""
    self = args[0]
    device = kwargs.get("device") or self.device
    return self.mapped(lambda _, part: torch.empty_like(part, device=device))


torch.serialization.add_safe_globals([PackedProductTensor])
