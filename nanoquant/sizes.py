"""The four sizes of a model, from its tensors: body bits, all bits, bytes on disk, resident."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from nanoquant.model_embeddings import quantized_tables
from nanoquant.packed_layers import Packed, is_packed


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model costs; a tensor that several modules share counts once everywhere."""

    body_bits_per_weight: float | None
    """Stored bits of signs or codebooks, and scales, per dense weight of quantized linears; None without them."""
    model_bits_per_parameter: float
    """Bits of all stored tensors, embeddings and norms too, per parameter of the dense model."""
    bytes_on_disk: int
    """Bytes of the tensors that a checkpoint stores, without the headers of its files."""
    bytes_resident: int
    """Bytes of all parameters and buffers, with the buffers that a checkpoint does not store."""
    body_weights: int
    """Dense weights of the quantized linears, without biases."""
    parameters: int
    """Parameters of the dense model."""
    embedding_bits_per_weight: float | None = None
    """Stored bits of codes, scales and zero points per dense weight of a quantized embedding and head; None without."""
    embedding_weights: int = 0
    """Dense weights of the quantized embedding and head; a tied head adds none."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values by name, for JSON."""
        return asdict(self)


def packed_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the data of ``tensor``: itself, or the inner ones of a wrapper."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the data of ``tensors``."""
    return sum(
        part.numel() * part.element_size() for tensor in tensors for part in packed_parts(tensor)
    )


def measure_sizes(model: nn.Module) -> Sizes:
    """Measure a dense or quantized model; tensors on the meta device count as if they were there.

    Args:
        model: any module; quantized linears are packed layers and modules whose ``weight`` is a packed tensor.
            Layers that train count as what they hold, float32 tensors: pack them first.
    """
    body_bits = body_weights = packed_numel = 0
    for module in model.modules():
        if isinstance(module, Packed):
            body_bits += module.bits
            body_weights += module.in_features * module.out_features
            packed_numel += sum(
                p.numel() for p in module.parameters(recurse=False) if p is not module.bias
            )
        elif is_packed(weight := module._parameters.get("weight")):
            body_bits += weight.bits
            body_weights += weight.numel()
            packed_numel += weight.numel()
    tables = {id(table.codes): table for table in quantized_tables(model).values()}.values()
    table_tensors = [part for table in tables for part in table if part is not None]
    table_weights = sum(math.prod(table.shape) for table in tables)
    stored_names = model.state_dict().keys()
    parameters = list(model.parameters())
    buffers = dict(model.named_buffers())
    stored = tensor_bytes(parameters) + tensor_bytes(
        b for name, b in buffers.items() if name in stored_names
    )
    packed_numel += sum(part.numel() for part in table_tensors)
    dense_count = sum(p.numel() for p in parameters) - packed_numel + body_weights + table_weights
    if dense_count == 0:
        raise ValueError(
            f"{type(model).__name__} has no parameters, so it has no bits per parameter"
        )
    return Sizes(
        body_bits_per_weight=body_bits / body_weights if body_weights else None,
        model_bits_per_parameter=8 * stored / dense_count,
        bytes_on_disk=stored,
        bytes_resident=tensor_bytes(parameters) + tensor_bytes(buffers.values()),
        body_weights=body_weights,
        parameters=dense_count,
        embedding_bits_per_weight=(
            8 * tensor_bytes(table_tensors) / table_weights if table_weights else None
        ),
        embedding_weights=table_weights,
    )
