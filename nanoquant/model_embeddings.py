"""The token embedding and the head of a model: found, quantized, tied, recorded for a checkpoint, and dense again."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from nanoquant.embedding import (
    TABLE_PARTS,
    EmbeddingConfig,
    QuantizedEmbedding,
    QuantizedHead,
    Table,
    check_width,
    dense_matrix,
    meta_table,
    quantize_table,
    table_of,
)
from nanoquant.packed_layers import is_packed
from nanoquant.packed_linear import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESIZE = "resize_token_embeddings"
"""Method of transformers that models with tables replace."""


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
    if config.bits is None:
        raise ValueError(
            "embedding.bits=null is chosen by quantize under budget.file; give 16, 8 or 4"
        )
    if config.bits == 16:
        return
    for name, module in find_embeddings(model).items():
        if table_of(module) is not None:
            raise ValueError(f"{name} is quantized already; load the dense model")
        if is_packed(module.weight):
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
    put_tables(model, embedding_tables(model, config))
    return model


def embedding_tables(model: PreTrainedModel, config: EmbeddingConfig) -> dict[str, Table]:
    """Tables of the token embedding and the head by name, one for both where they are tied; none at 16 bits.

    Raises:
        ValueError: as of :func:`quantize_embeddings`.
    """
    check_embeddings(model, config)
    if config.bits == 16:
        return {}
    weights = {name: module.weight for name, module in find_embeddings(model).items()}
    tables = {id(weight): quantize_table(weight, config) for weight in weights.values()}
    return {name: tables[id(weight)] for name, weight in weights.items()}


@torch.no_grad()
def round_embeddings(model: PreTrainedModel, tables: dict[str, Table]) -> None:
    """Give embedding and head, which stay dense, the values of their tables, in memory of their own."""
    weights = {model.get_submodule(name).weight: table for name, table in tables.items()}
    for weight, table in weights.items():  # once where they are tied
        weight.data = dense_matrix(table).to(weight)


def put_tables(model: PreTrainedModel, tables: dict[str, Table]) -> None:
    """Put tables into the embedding and the head by name; those that share one are tied from then on."""
    if not tables:
        return
    for name, table in tables.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            QuantizedEmbedding.from_embedding(module, table)
        else:
            head = QuantizedHead(table, module.bias)
            head._is_hf_initialized = True  # transformers would look for a weight to initialize
            model.set_submodule(name, head.train(module.training))
    for module in model.modules():
        if hasattr(module, RESIZE):
            setattr(module, RESIZE, functools.partial(_resize, module))
    first = next(iter(tables))
    for name, table in tables.items():
        if name != first and table is tables[first]:
            _tie(
                model,
                name,
                first,
                [part for part in TABLE_PARTS if getattr(table, part) is not None],
            )


def _resize(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Embedding:
    """In place of transformers' own method, which would copy the stand-in for the weight.

    Raises:
        ValueError: the number of rows would change.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings
    wanted = rows if new_num_tokens is None else new_num_tokens
    wanted += -wanted % (pad_to_multiple_of or 1)
    if wanted != rows:
        raise ValueError(
            f"the embedding is quantized and keeps its {rows} rows, but {wanted} are asked for; resize "
            "the dense model, then quantize it"
        )
    return embedding


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
        for module in model.modules():
            module.__dict__.pop(RESIZE, None)
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def table_entries(model: nn.Module) -> dict[str, dict[str, int]]:
    """What ``config.json`` records of the tables of a model, by the full name of their module."""
    return {
        name: {"bits": table.bits}
        | ({} if table.zeros is None else {"group_size": table.group_size})
        for name, table in quantized_tables(model).items()
    }


def recorded_config(name: str, entry: object) -> EmbeddingConfig:
    """What ``config.json`` records of a table.

    Raises:
        ValueError: it is not as :func:`table_entries` writes it.
    """
    known = isinstance(entry, dict) and {8: {"bits"}, 4: {"bits", "group_size"}}.get(
        entry.get("bits")
    )
    if not known or entry.keys() != known or not all(isinstance(v, int) for v in entry.values()):
        raise ValueError(
            f"the checkpoint lists {name} with {entry!r}; it needs bits, 8 or 4, and at 4 a group_size"
        )
    return EmbeddingConfig(**entry)


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
        config = recorded_config(name, entries[name])
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
