"""PackedWeight: what both packed tensors do alike for torchao; F.linear, moves, casts, slices, and shards.

Rows (output channels) can be cut anywhere, columns (input channels) where bytes begin; a cut shares memory with what it
was cut from, and its ``dequantize()`` is the same cut of the dense weight, bit for bit. So ``distribute_tensor`` and
``parallelize_module`` divide a weight by rows (``ColwiseParallel``) or by columns (``RowwiseParallel``), and
``fully_shard`` divides by rows what has a row per output; the rest is small or shared, and each process keeps it whole.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor, fill_defaults

from nanoquant.packed_parallel import EVENLY, implement_sharding

aten = torch.ops.aten


class PackedWeight(TorchAOBaseTensor):
    """A weight (d_out, d_in) behind stored tensors, which ``F.linear`` computes with."""

    gathered_parts: tuple[str, ...]
    """Names of the stored tensors of which each process of FSDP2 holds its own; it holds the others whole."""
    _is_hf_initialized = True  # transformers initializes tensors without this mark at random

    @abstractmethod
    def parts(self) -> dict[str, Tensor | None]:
        """The stored tensors by name, in the order of the operator."""

    @abstractmethod
    def mapped(
        self, function: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedWeight:
        """The same with every stored tensor replaced by ``function`` of its name and value."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The dense weight (d_out, d_in) in the dtype that the tensor shows."""

    @abstractmethod
    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product of x (..., d_in) with the weight: (..., d_out) in the dtype of ``x``."""

    @property
    @abstractmethod
    def column_step(self) -> int:
        """Columns can be cut at multiples of it, where bytes begin in every row."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> PackedWeight:
        """Rows ``start`` to ``stop``, sharing the stored tensors."""

    @abstractmethod
    def byte_columns(self, start: int, stop: int) -> PackedWeight:
        """Columns ``start`` to ``stop``, both where bytes begin, or at the end."""

    @property
    def bits(self) -> int:
        """Bits of all that is stored."""
        stored = [t for t in self.parts().values() if t is not None]
        return 8 * sum(t.numel() * t.element_size() for t in stored)

    def columns(self, start: int, stop: int) -> PackedWeight:
        """Columns ``start`` to ``stop``, sharing the stored tensors.

        Raises:
            ValueError: they begin or end within a byte.
        """
        step, d_in = self.column_step, self.shape[1]
        if start == stop:
            return self.byte_columns(0, 0)
        if start % step or (stop % step and stop != d_in):
            raise ValueError(
                f"got columns {start}:{stop} of a {type(self).__name__} of shape {tuple(self.shape)}, whose columns "
                f"can be cut at multiples of {step} alone, where bytes begin; cut there, cut rows instead "
                "(ColwiseParallel, Shard(0)), or cut its dequantize()"
            )
        return self.byte_columns(start, stop)

    def cut(self, dim: int, start: int, stop: int) -> PackedWeight:
        """Rows or columns, by the number of the dimension."""
        return self.columns(start, stop) if dim % 2 else self.rows(start, stop)

    def fsdp_pre_all_gather(
        self,
        mesh: torch.distributed.DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: object,
    ) -> tuple[tuple[Tensor, ...], None]:
        """What FSDP2 gathers of this process's rows, before the forward pass.

        Raises:
            ValueError: the processes have different numbers of rows.
        """
        if outer_size[0] % mesh.size():
            raise ValueError(
                f"got {outer_size[0]} rows of a {type(self).__name__} for {mesh.size()} processes; {EVENLY}"
            )
        return tuple(self._gathered().values()), None

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: None,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[PackedWeight, tuple[Tensor, ...]] | None:
        """The whole weight around what FSDP2 has gathered; ``out`` is an earlier one, over the same memory."""
        if out is not None:
            return None
        gathered = dict(zip(self._gathered(), outputs, strict=True))
        return self.mapped(lambda name, t: gathered.get(name, t), dtype), outputs

    def _gathered(self) -> dict[str, Tensor]:
        """Those of :attr:`gathered_parts` that there are."""
        parts = self.parts()
        return {name: parts[name] for name in self.gathered_parts if parts[name] is not None}

    def _stable_hash_for_caching(self) -> str:
        """Key of torch.compile's cache: all that a compiled graph can depend on."""
        names, attributes = self.__tensor_flatten__()
        stored = [(name, getattr(self, name)) for name in names]
        parts = [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in stored]
        form = (type(self).__qualname__, self.shape, attributes, self.requires_grad, parts)
        return hashlib.blake2b(repr(form).encode(), digest_size=16).hexdigest()

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401
        """Torchao's, with words for what a packed weight can't do."""
        if func not in cls._ATEN_OP_TABLE[cls]:
            raise NotImplementedError(
                f"got {func} of a {cls.__name__}, which can be the weight of F.linear, be moved, copied, cast to "
                "floating point, sliced and sharded; take its dequantize() for anything else"
            )
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@PackedWeight.implements(aten.linear.default)
@PackedWeight.implements_torch_function(nn.functional.linear)
def _linear(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """F.linear(x, weight, bias) through the packed operator."""
    return _apply(*args, **kwargs)


def _apply(input: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Spell out F.linear's arguments, which may come by name."""
    for other in (input, bias):
        if isinstance(other, PackedWeight):
            raise ValueError(
                f"a {type(other).__name__} can be the weight of F.linear, not its input or bias"
            )
    return weight.multiply(input, bias)


@PackedWeight.implements(aten._to_copy.default)
def _to_copy(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """Move or cast; torchao's own version drops the dtype without a word."""
    self = args[0]
    to = self._get_to_kwargs(*args[1:], **kwargs)
    device, dtype, non_blocking = to["device"], to["dtype"], to["non_blocking"]
    if not dtype.is_floating_point:
        raise ValueError(
            f"a {type(self).__name__} can be cast to floating point dtypes only, got {dtype}"
        )
    cast = None if dtype == self.dtype else dtype  # a move alone leaves what is stored as it is

    def moved(name: str, part: Tensor) -> Tensor:
        return part.to(
            device, cast if part.is_floating_point() else None, non_blocking=non_blocking
        )

    return return_and_correct_aliasing(func, args, kwargs, self.mapped(moved, dtype))


@PackedWeight.implements(aten.empty_like.default)
def _empty_like(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """Uninitialized tensor of the same packed shapes, as ``nn.Module.to_empty`` asks for."""
    device = kwargs.get("device") or args[0].device
    return args[0].mapped(lambda _, part: torch.empty_like(part, device=device))


@PackedWeight.implements(aten.slice.Tensor)
def _slice(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> PackedWeight:
    """Rows or columns next to each other."""
    self, dim, start, end, step = fill_defaults(args, 5, [0, None, None, 1])
    if step != 1:
        raise ValueError(
            f"a {type(self).__name__} can be sliced with step 1 alone, got {step}; slice its dequantize()"
        )
    start, stop, _ = slice(start, end).indices(self.shape[dim])
    return return_and_correct_aliasing(func, args, kwargs, self.cut(dim, start, max(start, stop)))


@PackedWeight.implements([aten.split.Tensor, aten.split_with_sizes.default])
def _split(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> list[PackedWeight]:
    """All rows or columns, in pieces."""
    self, sizes, dim = fill_defaults(args, 3, [0])
    count = self.shape[dim]
    if not isinstance(sizes, Sequence):
        sizes = [min(sizes, count - first) for first in range(0, count, sizes)]
    if sum(sizes) != count or min(sizes, default=0) < 0:
        raise ValueError(
            f"sizes of a split must be at least 0 and add up to {count}, got {list(sizes)}"
        )
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [self.cut(dim, *ends[i : i + 2]) for i in range(len(sizes))]


@PackedWeight.implements(aten.select.int)
def _select(func: Callable, types: tuple, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """One row (d_in,) or column (d_out,), which is dense."""
    self, dim, index = args
    count, step = self.shape[dim], self.column_step if dim % 2 else 1
    index = range(count)[index]
    first = index // step * step
    return self.cut(dim, first, min(first + step, count)).dequantize().select(dim, index - first)


implement_sharding(PackedWeight)
