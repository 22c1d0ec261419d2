"""Tensors of which each process holds a part, as torch's DTensor: whole again, cut like another, gathered into a file.

All processes call these functions alike. A tensor that is no shard passes through them as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanoquant.mapped import DTYPES
from nanoquant.processes import broadcast, first

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return hasattr(tensor, "full_tensor")  # spares the import of torch.distributed.tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, which all processes gather."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def cut(values: Tensor, like: Tensor) -> Tensor:
    """This process's part of whole values, divided as ``like`` is, in memory of its own on its device."""
    if not is_shard(like):
        return values.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None).clone()


def gather_to_first(tensors: Iterable[Tensor], work: Callable[[Iterator[Tensor]], object]) -> None:
    """Have the first process work on whole tensors, which all gather one at a time.

    Args:
        tensors: the same on all.
        work: takes them in order, all or fewer; an error there is raised on all processes.
    """
    parts, error = (whole(tensor.detach()) for tensor in tensors), None
    if first():
        try:
            work(parts)
        except Exception as raised:
            error = raised
    for _ in parts:  # the others gather what they do not keep
        pass
    if (error := broadcast(error)) is not None:
        raise error


def save_parts(
    path: Path, like: Mapping[str, Tensor], parts: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, one tensor after the other.

    Args:
        path: of the file.
        like: names, shapes and types.
        parts: the values, in that order.
        metadata: text by name.
    """
    header, begin = {"__metadata__": dict(metadata)}, 0
    for name, tensor in like.items():
        end = begin + tensor.numel() * tensor.itemsize
        shape, dtype = list(tensor.shape), NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            stream.write(part.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
