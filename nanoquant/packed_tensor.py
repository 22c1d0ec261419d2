"""PackedBinaryTensor: packed signs and scales behind a (d_out, d_in) weight, for torchao."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nanoquant.binary import BinaryFactors
from nanoquant.packed_linear import dequantize, pack_factors
from nanoquant.packed_weight import PackedWeight
from nanoquant_kernels import binary_low_rank_linear


class PackedBinaryTensor(PackedWeight):
    """Weight diag(s1) U V^T diag(s2), one stored bit per sign (NanoQuant, arXiv 2602.06694, Eq. 1).

    ``F.linear`` computes with the packed form; ``dequantize`` gives the dense weight.
    ``.to(dtype)`` casts the scales together with the dtype that the tensor shows, as it would cast
    a dense weight; the signs stay.

    ``torch.load(file, weights_only=True)`` knows this class once it has been imported, which
    ``import nanoquant`` alone leaves undone to stay light. So say
    ``from nanoquant import PackedBinaryTensor`` before loading such a file.

    Args:
        u_signs: uint8 (d_out, ceil(rank / 8)), rows of U.
        v_signs: uint8 (rank, ceil(d_in / 8)), columns of V.
        s1: (d_out,) output scales.
        s2: (d_in,) input scales.
        rank: number of sign columns r.
        dtype: the dtype that the tensor shows.
    """

    tensor_data_names = ["u_signs", "v_signs", "s1", "s2"]
    tensor_attribute_names = ["rank", "dtype"]
    gathered_parts = ("u_signs", "s1")
    column_step = 8

    @staticmethod
    def __new__(
        cls: type,
        u_signs: Tensor,
        v_signs: Tensor,
        s1: Tensor,
        s2: Tensor,
        rank: int,
        dtype: torch.dtype,
    ) -> PackedBinaryTensor:
        """Make the wrapper: the outer shape, dtype and device without storage."""
        shape = (s1.shape[0], s2.shape[0])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=u_signs.device)

    def __init__(
        self,
        u_signs: Tensor,
        v_signs: Tensor,
        s1: Tensor,
        s2: Tensor,
        rank: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.u_signs, self.v_signs, self.s1, self.s2, self.rank = u_signs, v_signs, s1, s2, rank

    @classmethod
    def from_factors(
        cls,
        factors: BinaryFactors,
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype | None = None,
    ) -> PackedBinaryTensor:
        """Pack the signs of ``factors`` of one matrix.

        Args:
            factors: of one matrix.
            scale_dtype: the scales are rounded to it.
            dtype: what the tensor shows; none means ``scale_dtype``.

        Raises:
            ValueError: a scale is not finite, or overflows ``scale_dtype``.
        """
        return cls(*pack_factors(factors, scale_dtype), factors.rank, dtype or scale_dtype)

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in) in the dtype that the tensor shows."""
        return dequantize(self.u_signs, self.v_signs, self.s1, self.s2, self.rank).to(self.dtype)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_data_names}

    def mapped(
        self, function: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedBinaryTensor:
        """The same with every stored tensor replaced by ``function`` of its name and value."""
        parts = (function(name, part) for name, part in self.parts().items())
        return PackedBinaryTensor(*parts, self.rank, dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of x (..., d_in) with the weight: (..., d_out) in the dtype of ``x``."""
        return binary_low_rank_linear(
            x, self.u_signs, self.v_signs, self.s1, self.s2, bias, self.rank
        )

    def rows(self, start: int, stop: int) -> PackedBinaryTensor:
        """Rows ``start`` to ``stop``, sharing the stored tensors."""
        of_rows = ("u_signs", "s1")
        return self.mapped(lambda name, part: part[start:stop] if name in of_rows else part)

    def byte_columns(self, start: int, stop: int) -> PackedBinaryTensor:
        """Columns ``start`` to ``stop``, both multiples of 8 or at the end."""
        cuts = {"v_signs": slice(start // 8, (stop + 7) // 8), "s2": slice(start, stop)}
        return self.mapped(lambda name, part: part[..., cuts[name]] if name in cuts else part)

    def __repr__(self) -> str:
        """Shape, rank and bits per weight; never the values."""
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, rank={self.rank}, "
            f"bits={self.bits / max(1, self.numel()):.3f}, dtype={self.dtype}, device={self.device})"
        )


def flatten_state_dict(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Replace every packed tensor by its parts, so that ``safetensors`` can store the result.

    Args:
        state_dict: tensors by name, as from ``module.state_dict()``.

    Returns:
        Plain tensors, where packed ``NAME`` became ``NAME.u_signs``, ``NAME.v_signs``, ``NAME.s1``
        and ``NAME.s2``, and the metadata (JSON texts by name) that :func:`unflatten_state_dict`
        needs.
    """
    tensors, metadata = {}, {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, PackedBinaryTensor):
            tensors[name] = tensor
            continue
        tensors |= {f"{name}.{part}": value for part, value in tensor.parts().items()}
        dtype = str(tensor.dtype).removeprefix("torch.")
        metadata[name] = json.dumps(
            {"type": "PackedBinaryTensor", "rank": tensor.rank, "dtype": dtype}
        )
    return tensors, metadata


def unflatten_state_dict(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """Undo :func:`flatten_state_dict`; other entries of ``metadata`` are left alone.

    Raises:
        ValueError: a part of a packed tensor is missing.
    """
    state_dict = dict(tensors)
    for name, text in metadata.items():
        if "PackedBinaryTensor" not in text:
            continue
        entry = json.loads(text)
        keys = [f"{name}.{part}" for part in PackedBinaryTensor.tensor_data_names]
        missing = [key for key in keys if key not in state_dict]
        if missing:
            raise ValueError(
                f"{name!r} is a packed tensor, but these of its parts are missing: {missing}"
            )
        parts = [state_dict.pop(key) for key in keys]
        state_dict[name] = PackedBinaryTensor(*parts, entry["rank"], getattr(torch, entry["dtype"]))
    return state_dict


torch.serialization.add_safe_globals([PackedBinaryTensor])
