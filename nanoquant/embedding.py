"""Token embedding and language model head at 8 or 4 bits: torchao's quantization, stored packed, looked up packed.

torchao has no tensor that is packed at 4 bits, looks up rows without making the whole table dense, and runs on CPUs and
GPUs alike. So its quantization gives codes, scales and zero points, and two modules hold them as plain tensors. A head
that is tied to the embedding shares its tensors: they are stored, counted and loaded once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from nanoquant.packed_linear import frozen
from nanoquant_kernels import pack_codes, table_linear, table_rows
from nanoquant_kernels.table import COLUMNS, dense_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLE_PARTS = ("codes", "scales", "zeros")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """How the token embedding and the language model head are stored."""

    bits: int = 16
    """Bits of an entry of the embedding and the head: 16 keeps them as they are, 8 and 4 quantize them."""
    group_size: int = 32
    """At 4 bits, columns that share a scale and a zero point, a multiple of 32; at 8 bits a row shares one scale."""

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4):
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
    """Quantize a matrix (n, d) by torchao: symmetric rows at 8 bits, asymmetric groups at 4.

    Raises:
        ValueError: the group size does not divide d.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    check_width(weight.shape[1], config)
    wide = config.bits == 8
    weight = weight.detach()
    quantized = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, weight.shape[1] if wide else config.group_size),
        torch.int8 if wide else torch.int4,
        mapping_type=MappingType.SYMMETRIC if wide else MappingType.ASYMMETRIC,
    )
    codes = quantized.qdata if wide else pack_codes(quantized.qdata)
    zeros = None if wide else frozen(quantized.zero_point.contiguous())
    return Table(frozen(codes.contiguous()), frozen(quantized.scale.contiguous()), zeros)


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
        return dense_rows(self.codes, self.scales, self.zeros)

    def restore(self, weight: nn.Parameter) -> None:
        """Turn this module back into the dense embedding that it was, with another weight."""
        for name in TABLE_PARTS:
            delattr(self, name)
        self.__class__ = self.dense_class
        self.weight = weight

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
        return dense_rows(self.codes, self.scales, self.zeros)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{describe(table_of(self))}, bias={self.bias is not None}"


def describe(table: Table) -> str:
    """Shape and bits of a table in words."""
    n, d = table.shape
    return f"{n}, {d}, bits={table.bits}, group_size={table.group_size}"


def quantized_tables(model: nn.Module) -> dict[str, Table]:
    """Tables of a model by the full name of their module; a tied head is listed too."""
    found = {name: table_of(module) for name, module in model.named_modules()}
    return {name: table for name, table in found.items() if table is not None}


def find_embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The token embedding of a model and, after it, its head where that is a linear of its own.

    Raises:
        ValueError: there is no such embedding, or one of the two is of a kind that can't be quantized.
    """
    names = {id(module): name for name, module in model.named_modules()}
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = head = None
    if not isinstance(embedding, nn.Embedding) or id(embedding) not in names:
        raise ValueError(
            f"found no token embedding in {type(model).__name__}: get_input_embeddings gives "
            f"{type(embedding).__name__}, not nn.Embedding; keep embedding.bits=16"
        )
    if embedding.max_norm is not None:
        raise ValueError("the embedding has max_norm, which changes it; keep embedding.bits=16")
    if head is not None and type(head) not in (nn.Linear, QuantizedHead):
        raise ValueError(
            f"the head is a {type(head).__name__}, not nn.Linear, and can't be quantized to 8 or 4 "
            "bits; keep embedding.bits=16"
        )
    return {names[id(module)]: module for module in (embedding, head) if module is not None}


def check_embeddings(model: PreTrainedModel, config: EmbeddingConfig) -> None:
    """Raise ValueError if :func:`quantize_embeddings` would; nothing to check at 16 bits."""
    if config.bits == 16:
        return
    for name, module in find_embeddings(model).items():
        if table_of(module) is not None:
            raise ValueError(f"{name} is quantized already; load the dense model")
        if "u_signs" in dir(module.weight):
            raise ValueError(f"{name} is packed already; keep embedding.bits=16")
        check_width(module.weight.shape[1], config)


def quantize_embeddings(model: PreTrainedModel, config: EmbeddingConfig) -> PreTrainedModel:
    """Quantize the token embedding and the head of a model in place; a tied head stays tied.

    Args:
        model: a causal language model.
        config: at 16 bits nothing happens.

    Raises:
        ValueError: no embedding is found, it is quantized already, or the groups do not fit its width.
    """
    check_embeddings(model, config)
    if config.bits != 16:
        weights = {name: module.weight for name, module in find_embeddings(model).items()}
        tables = {id(weight): quantize_table(weight, config) for weight in weights.values()}
        put_tables(model, {name: tables[id(weight)] for name, weight in weights.items()})
    return model


def put_tables(model: PreTrainedModel, tables: dict[str, Table]) -> None:
    """Put tables into the embedding and the head by name; those that share one are tied from then on."""
    for name, table in tables.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            QuantizedEmbedding.from_embedding(module, table)
        else:
            head = QuantizedHead(table, module.bias)
            head._is_hf_initialized = True  # transformers would look for a weight to initialize
            model.set_submodule(name, head.train(module.training))
    first = next(iter(tables))
    for name, table in tables.items():
        if name != first and table is tables[first]:
            _tie(
                model,
                name,
                first,
                [part for part in TABLE_PARTS if getattr(table, part) is not None],
            )


def _tie(model: PreTrainedModel, target: str, source: str, parts: list[str]) -> None:
    """Tell transformers that parts of two modules are one, in place of their weights."""
    pairs = {f"{target}.{part}": f"{source}.{part}" for part in parts}
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        before = dict(getattr(model, name, None) or {})
        before.pop(f"{target}.weight", None)
        setattr(model, name, before | pairs)  # of this model alone, not of its class


def dense_embeddings(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Put dense matrices with the quantized values back; what is tied stays tied."""
    weights: dict[int, nn.Parameter] = {}
    for name, table in quantized_tables(model).items():
        module = model.get_submodule(name)
        if id(table.codes) not in weights:
            weights[id(table.codes)] = frozen(module.dequantize().to(dtype))
        weight = weights[id(table.codes)]
        if isinstance(module, QuantizedEmbedding):
            module.restore(weight)
        else:
            head = nn.Linear(*reversed(weight.shape), module.bias is not None, "meta")
            head.weight, head.bias = weight, module.bias
            model.set_submodule(name, head.train(module.training))
    if weights:
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def table_entries(model: nn.Module) -> dict[str, dict[str, int]]:
    """What ``config.json`` records of the tables of a model, by the full name of their module."""
    return {
        name: {"bits": table.bits}
        | ({} if table.zeros is None else {"group_size": table.group_size})
        for name, table in quantized_tables(model).items()
    }


def swap_embeddings(model: PreTrainedModel, entries: dict[str, dict[str, int]]) -> None:
    """Put tables without storage in the place of the recorded modules of a model on the meta device.

    Raises:
        ValueError: a recorded module is not the embedding or the head of this model.
    """
    found = find_embeddings(model) if entries else {}
    tables: dict[str, Table] = {}
    for name, module in found.items():
        if name not in entries:
            continue
        source = model.all_tied_weights_keys.get(f"{name}.weight", "").removesuffix(".weight")
        config = EmbeddingConfig(**entries[name])
        n, d = module.weight.shape
        check_width(d, config)
        tables[name] = tables.get(source) or meta_table(n, d, config, module.weight.dtype)
    foreign = sorted(entries.keys() - tables.keys())
    if foreign:
        raise ValueError(
            f"the checkpoint lists {foreign[0]} as a quantized embedding or head, but those of the "
            f"model are {', '.join(found)}"
        )
    if tables:
        put_tables(model, tables)
