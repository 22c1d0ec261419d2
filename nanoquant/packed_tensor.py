"""PackedBinaryTensor: packed signs and scales behind a (d_out, d_in) weight, for torchao."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from nanoquant.binary import BinaryFactors
from nanoquant.packed_linear import dequantize, pack_factors
from nanoquant_kernels import binary_low_rank_linear

aten = torch.ops.aten


class PackedBinaryTensor(TorchAOBaseTensor):
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
    _is_hf_initialized = True  # transformers initializes tensors without this mark at random

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

    @property
    def bits(self) -> int:
        """Bits of the stored signs and scales."""
        return 8 * sum(t.numel() * t.element_size() for t in self._parts().values())

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in) in the dtype that the tensor shows."""
        return dequantize(self.u_signs, self.v_signs, self.s1, self.s2, self.rank).to(self.dtype)

    def _parts(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.tensor_data_names}

    def _stable_hash_for_caching(self) -> str:
        """Key of torch.compile's cache: all that a compiled graph can depend on."""
        parts = [
            (name, t.shape, t.stride(), t.dtype, t.device) for name, t in self._parts().items()
        ]
        key = repr(
            (type(self).__qualname__, self.shape, self.dtype, self.rank, self.requires_grad, parts)
        )
        return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        """Shape, rank and bits per weight; never the values."""
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, rank={self.rank}, "
            f"bits={self.bits / self.numel():.3f}, dtype={self.dtype}, device={self.device})"
        )


@PackedBinaryTensor.implements(aten.linear.default)
@PackedBinaryTensor.implements_torch_function(torch.nn.functional.linear)
def _linear(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """F.linear(x, weight, bias) through the packed operator."""
    return _apply(*args, **kwargs)


def _apply(input: Tensor, weight: PackedBinaryTensor, bias: Tensor | None = None) -> Tensor:
    """Spell out F.linear's arguments, which may come by name."""
    if not isinstance(weight, PackedBinaryTensor):
        raise ValueError(
            "a PackedBinaryTensor can be the weight of F.linear, not its input or bias"
        )
    return binary_low_rank_linear(
        input, weight.u_signs, weight.v_signs, weight.s1, weight.s2, bias, weight.rank
    )


@PackedBinaryTensor.implements(aten._to_copy.default)
def _to_copy(
    func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]
) -> PackedBinaryTensor:
    """Move or cast; torchao's own version drops the dtype without a word."""
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    device, dtype, non_blocking = to["device"], to["dtype"], to["non_blocking"]
    if not dtype.is_floating_point:
        raise ValueError(
            f"a PackedBinaryTensor can be cast to floating point dtypes only, got {dtype}"
        )
    signs = [t.to(device, non_blocking=non_blocking) for t in (self.u_signs, self.v_signs)]
    cast = (
        None if dtype == self.dtype else dtype
    )  # a move alone leaves the stored scales as they are
    scales = [t.to(device, cast, non_blocking=non_blocking) for t in (self.s1, self.s2)]
    return return_and_correct_aliasing(
        func, args, kwargs, PackedBinaryTensor(*signs, *scales, self.rank, dtype)
    )


@PackedBinaryTensor.implements(aten.empty_like.default)
def _empty_like(
    func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]
) -> PackedBinaryTensor:
    """Uninitialized tensor of the same packed shapes, as ``nn.Module.to_empty`` asks for."""
    self = args[0]
    device = kwargs.get("device") or self.device
    parts = [torch.empty_like(t, device=device) for t in self._parts().values()]
    return PackedBinaryTensor(*parts, self.rank, self.dtype)


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
        tensors |= {f"{name}.{part}": value for part, value in tensor._parts().items()}
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
