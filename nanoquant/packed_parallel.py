"""What tensor parallelism (DTensor) and FSDP2 ask of a packed weight, besides slices.

DTensor spells ``F.linear`` as a product with the transposed weight, and sends parts from the first process with
collectives. FSDP2 fills zeros with the rows of a process, and takes views of the whole shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

if TYPE_CHECKING:
    from nanoquant.packed_weight import PackedWeight

aten = torch.ops.aten
EVENLY = (
    "fully_shard divides packed tensors evenly alone: take a number of processes that divides the rows, or before it "
    "call nanoquant.pack_model(model), whose layers hold plain tensors that may be divided unevenly"
)


class TransposedWeight(TorchAOBaseTensor):
    """What ``weight.t()`` is, (d_in, d_out), to be multiplied with."""

    tensor_data_names = ["weight"]
    tensor_attribute_names = []

    @staticmethod
    def __new__(cls: type, weight: PackedWeight) -> TransposedWeight:
        """Make the wrapper: the outer shape, dtype and device without storage."""
        d_out, d_in = weight.shape
        return torch.Tensor._make_wrapper_subclass(
            cls, (d_in, d_out), strides=(1, d_in), dtype=weight.dtype, device=weight.device
        )

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight


@TransposedWeight.implements(aten.t.default)
def _back(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """The weight that was transposed; a new tensor, for views need one."""
    return args[0].weight.mapped(lambda _, part: part)


def _right(matrix: Tensor) -> PackedWeight:
    """The packed weight of a product's right-hand side."""
    if not isinstance(matrix, TransposedWeight):
        raise ValueError(
            "a transposed packed weight can be the right-hand side of a product, not its left one or its bias; take "
            "its dequantize()"
        )
    return matrix.weight


@TransposedWeight.implements(aten.mm.default)
def _mm(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Product of x (n, d_in) with the transposed weight."""
    return _right(args[1]).multiply(args[0])


@TransposedWeight.implements(aten.addmm.default)
def _addmm(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The same with a bias (d_out,)."""
    factors = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if factors != (1, 1):
        raise ValueError(
            f"addmm of a packed weight takes beta=1 and alpha=1, got {factors[0]} and {factors[1]}; multiply afterwards"
        )
    return _right(args[2]).multiply(args[1], args[0])


def _transpose(
    func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]
) -> TransposedWeight:
    """The transposed weight, without a copy."""
    return TransposedWeight(args[0])


def _mm_dense(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Gradient (n, d_out) at the output times the weight: that at the input."""
    return args[0] @ args[1].dequantize().to(args[0].dtype)


def _new_zeros(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """Zeros of an equal share of the rows, for FSDP2 to fill with those of a process."""
    self, size = args[0], tuple(args[1])
    d_out, d_in = self.shape
    share = len(size) == 2 and size[1] == d_in and 0 < size[0] <= d_out and d_out % size[0] == 0
    dtype = kwargs.get("dtype") or self.dtype
    if not share or dtype != self.dtype:
        raise ValueError(
            f"got zeros of shape {size} in {dtype} for an equal share of the rows of a {type(self).__name__} of shape "
            f"{tuple(self.shape)} in {self.dtype}; {EVENLY}"
        )
    return self.rows(0, size[0]).mapped(lambda _, part: part.new_zeros(part.shape))


def _view(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """The same weight: FSDP2 asks for its own shape, and for a flat view that it does not read."""
    self, size = args[:2]
    if tuple(size) not in (tuple(self.shape), (-1,)):
        raise ValueError(
            f"a {type(self).__name__} of shape {tuple(self.shape)} has no view of shape {tuple(size)}; "
            "view its dequantize()"
        )
    return return_and_correct_aliasing(func, args, kwargs, self.mapped(lambda _, part: part))


def _as_strided(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """The same weight, which has one order of its numbers alone."""
    self, size, stride, *offset = args
    own = tuple(self.shape), tuple(self.stride()), [0]
    if (tuple(size), tuple(stride), [offset[0] or 0] if offset else [0]) != own:
        raise ValueError(
            f"a {type(self).__name__} has the strides {own[1]} alone, got size {tuple(size)} and stride {tuple(stride)}"
            "; take its dequantize()"
        )
    return return_and_correct_aliasing(func, args, kwargs, self.mapped(lambda _, part: part))


def _stored(weight: PackedWeight) -> list[Tensor]:
    """The stored tensors that there are."""
    return [part for part in weight.parts().values() if part is not None]


def _broadcast(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Send one weight to all processes, one stored tensor after the other."""
    (weight,), *rest = args
    for part in _stored(weight):
        _, work = func([part], *rest, **kwargs)
        work.wait()
    return [weight], work


def _scatter(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Send a weight to each process, one stored tensor after the other."""
    (weight,), given, *rest = args
    sources = [[_stored(w) for w in weights] for weights in given]  # none but at the sender
    for i, part in enumerate(_stored(weight)):
        _, work = func([part], [[w[i] for w in weights] for weights in sources], *rest, **kwargs)
        work.wait()
    return [weight], work


def implement_sharding(kind: type[PackedWeight]) -> None:
    """Give a kind of weight the operators of this file."""
    kind.implements(aten.t.default)(_transpose)
    kind.implements(aten.mm.default)(_mm_dense)
    kind.implements(aten.new_zeros.default)(_new_zeros)
    kind.implements(aten.view.default)(_view)
    kind.implements(aten.as_strided.default)(_as_strided)
    if torch.distributed.is_available():
        kind.implements(torch.ops.c10d.broadcast_.default)(_broadcast)
        kind.implements(torch.ops.c10d.scatter_.default)(_scatter)
