"""Token embedding and language model head at 8 or 4 bits: torchao's quantization, stored packed, looked up packed.

torchao has no tensor that is packed at 4 bits, looks up rows without making the whole table dense, and runs on CPUs and
GPUs alike. So its quantization gives codes, scales and zero points, and two modules hold them as plain tensors. A head
that is tied to the embedding shares its tensors: they are stored, counted and loaded once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanoquant.packed_linear import frozen
from nanoquant_kernels import pack_codes, table_linear, table_rows
from nanoquant_kernels.table import COLUMNS, dense_rows

TABLE_PARTS = ("codes", "scales", "zeros")
EMBEDDING_BITS = (16, 8, 4)
PART = 1 << 21
"""Entries of a matrix that are quantized, or made dense again, at a time."""
PART_BYTES = 16
"""Most bytes that either takes for each of them, besides what it gives."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How the token embedding and the language model head are stored."""

    bits: int | None = 16
    """Bits of an entry of the embedding and the head: 16 keeps them as they are, 8 and 4 quantize them; null lets
    measured losses choose under budget.file."""
    group_size: int = 32
    """At 4 bits, columns that share a scale and a zero point, a multiple of 32; at 8 bits a row shares one scale."""

    def __post_init__(self) -> None:
        if self.bits not in (None, *EMBEDDING_BITS):
            raise ValueError(
                f"bits of the embedding must be 16, 8 or 4, got {self.bits}; 16 leaves it as it is"
            )
        if self.group_size < COLUMNS or self.group_size % COLUMNS:
            raise ValueError(
                f"group_size of the embedding must be a multiple of {COLUMNS}, got {self.group_size}"
            )


class Table(NamedTuple):
    """The tensors of a quantized matrix (n, d), in the layout of ``nanoquant_kernels.table``."""

    codes: nn.Parameter
    """int8 (n, d) or, two codes of 4 bits a byte, uint8 (n, d / 2)."""
    scales: nn.Parameter
    """(n, G) in the dtype of the model, G groups of columns; at 8 bits G is 1."""
    zeros: nn.Parameter | None
    """int8 (n, G) at 4 bits, else None."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.zeros is None else 4

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of the dense matrix."""
        n, width = self.codes.shape
        return n, width * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def put_into(self, module: nn.Module) -> None:
        """Register the tensors as parameters of a module; a table in two modules is shared."""
        for name in TABLE_PARTS:
            module.register_parameter(name, getattr(self, name))


@torch.no_grad()
def quantize_table(weight: Tensor, config: EmbeddingConfig) -> Table:
    """Quantize a matrix (n, d) by torchao, some rows at a time: symmetric rows at 8 bits, asymmetric groups at 4.

    Raises:
        ValueError: the group size does not divide d.
    """
    check_width(weight.shape[1], config)
    wholes: list[Tensor | None] = []
    for rows in row_parts(*weight.shape):
        parts = _quantized_rows(weight[rows].detach(), config)
        wholes = wholes or [p if p is None else p.new_empty(len(weight), p.shape[1]) for p in parts]
        for whole, part in zip(wholes, parts, strict=True):
            if whole is not None:
                whole[rows] = part
    return Table(*(whole if whole is None else frozen(whole) for whole in wholes))


def row_parts(n: int, d: int) -> Iterator[slice]:
    """Ranges of the rows of a matrix (n, d), of :data:`PART` entries or one row each."""
    step = max(1, PART // d)
    return (slice(begin, min(n, begin + step)) for begin in range(0, n, step))


def _quantized_rows(
    weight: Tensor, config: EmbeddingConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of rows (m, d); rows and groups know nothing of each other."""
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    wide = config.bits == 8
    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, weight.shape[1] if wide else config.group_size),
        torch.int8 if wide else torch.int4,
        mapping_type=MappingType.SYMMETRIC if wide else MappingType.ASYMMETRIC,
    )
    codes = quantized.qdata if wide else pack_codes(quantized.qdata)
    return codes, quantized.scale, None if wide else quantized.zero_point


def dense_matrix(table: Table) -> Tensor:
    """The dense matrix (n, d) in the dtype of the scales, made some rows at a time."""
    dense = table.scales.new_empty(table.shape)
    for rows in row_parts(*table.shape):
        dense[rows] = dense_rows(*(part if part is None else part[rows] for part in table))
    return dense


@torch.no_grad()
def rounded_matrix(weight: Tensor, config: EmbeddingConfig) -> Tensor:
    """A matrix (n, d) with the values of its table, of which only some rows exist at a time.

    Raises:
        ValueError: as of :func:`quantize_table`.
    """
    found = torch.empty_like(weight)
    for rows in row_parts(*weight.shape):
        found[rows] = dense_matrix(quantize_table(weight[rows], config))
    return found


def check_width(width: int, config: EmbeddingConfig) -> None:
    """Raise ValueError if the groups of 4-bit codes do not fill rows of ``width`` columns."""
    if config.bits == 4 and width % config.group_size:
        possible = [size for size in (32, 64, 128) if width % size == 0]
        advice = f"choose {' or '.join(map(str, possible))}, or" if possible else "choose"
        raise ValueError(
            f"embedding.group_size={config.group_size} does not divide the {width} columns of the "
            f"embedding; {advice} 8 bits"
        )


def meta_table(n: int, d: int, config: EmbeddingConfig, dtype: torch.dtype) -> Table:
    """A table without storage, for tensors to be loaded into."""

    def empty(columns: int, kind: torch.dtype) -> nn.Parameter:
        return frozen(torch.empty(n, columns, dtype=kind, device="meta"))

    if config.bits == 8:
        return Table(empty(d, torch.int8), empty(1, dtype), None)
    groups = d // config.group_size
    return Table(empty(d // 2, torch.uint8), empty(groups, dtype), empty(groups, torch.int8))


def table_bytes(n: int, d: int, config: EmbeddingConfig, dtype: torch.dtype) -> int:
    """Bytes of the table of a matrix (n, d)."""
    parts = (part for part in meta_table(n, d, config, dtype) if part is not None)
    return sum(part.numel() * part.element_size() for part in parts)


def table_of(module: nn.Module) -> Table | None:
    """The table of a quantized embedding or head; None for other modules."""
    if not isinstance(module, QuantizedEmbedding | QuantizedHead):
        return None
    return Table(module.codes, module.scales, module.zeros)


def stand_in(table: Table) -> Tensor:
    """A tensor that takes no memory, with the shape, dtype and device of the dense matrix; every entry is NaN.

    Code of transformers asks the weight of an embedding for those. What computes with it finds out.
    """
    weight = table.scales.new_full((), float("nan")).expand(table.shape)
    weight._is_hf_initialized = True  # transformers would write random numbers into it
    return weight


class QuantizedEmbedding(nn.Embedding):
    """An embedding that looks rows up in a table of codes; made by :meth:`from_embedding` only.

    A subclass of ``nn.Embedding`` keeps its own forward, such as Gemma's, which scales the rows.
    """

    @staticmethod
    def from_embedding(module: nn.Embedding, table: Table) -> QuantizedEmbedding:
        """Turn the embedding itself into a quantized one; its other attributes stay."""
        del module.weight
        module.__class__ = _quantized_class(type(module))
        table.put_into(module)
        return module

    @property
    def weight(self) -> Tensor:
        """See :func:`stand_in`."""
        return stand_in(table_of(self))

    def forward(self, input: Tensor) -> Tensor:
        """Rows (..., d) of token ids (...), in the dtype of the scales."""
        return table_rows(input, self.codes, self.scales, self.zeros)

    def dequantize(self) -> Tensor:
        """The dense matrix (n, d) in the dtype of the scales."""
        return dense_matrix(table_of(self))

    def restore(self, weight: nn.Parameter) -> None:
        """Turn this module back into the dense embedding that it was, with another weight."""
        for name in TABLE_PARTS:
            delattr(self, name)
        self.__class__ = self.dense_class
        self.weight = weight

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Pickle by the dense class: that of a subclass's quantized embeddings is made at run time."""
        return _blank, (self.dense_class,), self.__dict__

    def extra_repr(self) -> str:
        """Shape and bits."""
        return describe(table_of(self))


QuantizedEmbedding.dense_class = nn.Embedding


@functools.cache
def _quantized_class(kind: type[nn.Embedding]) -> type[QuantizedEmbedding]:
    """The class of quantized embeddings of ``kind``: its own methods first, ours in place of nn.Embedding's."""
    if kind is nn.Embedding:
        return QuantizedEmbedding
    return type(f"Quantized{kind.__name__}", (kind, QuantizedEmbedding), {"dense_class": kind})


def _blank(kind: type[nn.Embedding]) -> QuantizedEmbedding:
    """A quantized embedding of ``kind`` without content, for pickle to fill."""
    made = _quantized_class(kind)
    return made.__new__(made)


class QuantizedHead(nn.Module):
    """A linear (n, d) whose weight is a table of codes.

    Args:
        table: may be the embedding's.
        bias: (n,) or None.
    """

    def __init__(self, table: Table, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = table.shape
        table.put_into(self)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """See :func:`stand_in`."""
        return stand_in(table_of(self))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` (..., d), giving (..., n) in the dtype of ``x``."""
        return table_linear(x, self.codes, self.scales, self.zeros, self.bias)

    def dequantize(self) -> Tensor:
        """The dense matrix (n, d) in the dtype of the scales."""
        return dense_matrix(table_of(self))

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{describe(table_of(self))}, bias={self.bias is not None}"


def describe(table: Table) -> str:
    """Shape and bits of a table in words."""
    n, d = table.shape
    return f"{n}, {d}, bits={table.bits}, group_size={table.group_size}"
