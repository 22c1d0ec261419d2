"""torchao's integers of 1 to 8 bits, stored in as many bits: a weight that torchao's ``quantize_`` and AWQ can make.

torchao chooses scales, zero points and codes (``IntxWeightOnlyConfig``) and computes the dense weight from them, but it
keeps each code in a whole byte, and its tensor can't carry AWQ's scales of the inputs. Here bit k of all codes is one
plane of packed bits, so that the tensor takes the bits that it claims, metadata included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.core.config import AOBaseConfig
from torchao.quantization import IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from nanoquant_kernels import pack_signs, unpack_signs

aten = torch.ops.aten


class PackedIntegerTensor(TorchAOBaseTensor):
    """Weight (d_out, d_in) of integer codes in groups along its rows, as torchao's ``IntxUnpackedToInt8Tensor``.

    Args:
        planes: uint8 (b, d_out, ceil(d_in / 8)), bit k of the codes, counted from the smallest one, in plane k.
        scale: (d_out, d_in / group).
        bits: b.
        group_size: weights that share a scale.
        dtype: the dtype that the tensor shows.
        zero_point: int8 (d_out, d_in / group); none means 0 everywhere.
        act_pre_scale: (d_in,), what inputs are multiplied by (AWQ); none means 1.
    """

    tensor_data_names = ["planes", "scale"]
    tensor_attribute_names = ["bits", "group_size", "dtype"]
    optional_tensor_data_names = ["zero_point", "act_pre_scale"]

    @staticmethod
    def __new__(
        cls: type,
        planes: Tensor,
        scale: Tensor,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> PackedIntegerTensor:
        """Make the wrapper: the outer shape, dtype and device without storage."""
        shape = (scale.shape[0], scale.shape[1] * group_size)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=planes.device)

    def __init__(
        self,
        planes: Tensor,
        scale: Tensor,
        bits: int,
        group_size: int,
        dtype: torch.dtype,
        zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.planes, self.scale, self.bits, self.group_size = planes, scale, bits, group_size
        self.zero_point, self.act_pre_scale = zero_point, act_pre_scale

    @classmethod
    def from_unpacked(
        cls, weight: IntxUnpackedToInt8Tensor, bits: int, keep_zeros: bool
    ) -> PackedIntegerTensor:
        """Store what torchao made in as few bits as it has; zero points only if asked, else they must be 0."""
        codes = weight.qdata.to(torch.int16) + 2 ** (bits - 1)  # 0 to 2^b - 1
        planes = torch.stack([pack_signs((codes >> k & 1).bool()) for k in range(bits)])
        assert keep_zeros or not weight.zero_point.any()
        zeros = weight.zero_point if keep_zeros else None
        return cls(planes, weight.scale, bits, weight.block_size[1], weight.dtype, zeros)

    def unpacked(self) -> IntxUnpackedToInt8Tensor:
        """Torchao's own tensor of the same codes, a byte each."""
        smallest = -(2 ** (self.bits - 1))
        codes = torch.full(self.shape, smallest, dtype=torch.int8, device=self.device)
        for k, plane in enumerate(self.planes):
            codes += (unpack_signs(plane, self.shape[1], torch.int8) < 0).to(torch.int8) << k
        zeros = self.zero_point
        return IntxUnpackedToInt8Tensor(
            codes,
            self.scale,
            torch.zeros_like(self.scale, dtype=torch.int8) if zeros is None else zeros,
            getattr(torch, f"int{self.bits}"),
            (1, self.group_size),
            self.dtype,
            None,
        )

    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in), without the scales of inputs, as torchao computes it."""
        return self.unpacked().dequantize()

    def __repr__(self) -> str:
        """Shape, bits and group size; never the values."""
        return (
            f"{type(self).__name__}({tuple(self.shape)}, bits={self.bits}, group={self.group_size})"
        )


@PackedIntegerTensor.implements(aten.linear.default)
@PackedIntegerTensor.implements_torch_function(F.linear)
def _linear(func: object, types: tuple, args: tuple, kwargs: dict) -> Tensor:
    """F.linear through the dense weight, which lives for one call."""
    x, weight, bias = (*args, None)[:3]
    if weight.act_pre_scale is not None:
        x = x * weight.act_pre_scale
    return F.linear(x, weight.dequantize(), kwargs.get("bias", bias) if kwargs else bias)


@dataclass
class PackedIntegerConfig(AOBaseConfig):
    """For torchao's ``quantize_`` and as the ``base_config`` of its ``AWQConfig``."""

    base: IntxWeightOnlyConfig
    """What chooses scales, zero points and codes."""
    bits: int
    """Bits of a code, those of ``base.weight_dtype``."""
    keep_zeros: bool
    """Whether zero points are stored, a byte each; symmetric codes have none."""


@register_quantize_module_handler(PackedIntegerConfig)
def pack_module(module: nn.Module, config: PackedIntegerConfig) -> nn.Module:
    """Quantize the weight of a linear by torchao and pack it."""
    holder = nn.Sequential(nn.Linear(1, 1, bias=False, device="meta"))
    holder[0].weight = nn.Parameter(module.weight.detach(), requires_grad=False)
    quantize_(holder, config.base)
    packed = PackedIntegerTensor.from_unpacked(holder[0].weight, config.bits, config.keep_zeros)
    module.weight = nn.Parameter(packed, requires_grad=False)
    return module
