"""Tensors that stay in files: mapped into memory, read when they are used, forgotten when they are not needed.

The memory of a mapped tensor belongs to the system, which may take it back at any time, since the file has it all. A
write into a mapped weight goes to a private copy of the page, which :func:`forget` would undo, so nobody writes into
one; what is written into a tensor of :func:`scratch` stays, as long as the tensor lives.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nanoquant.checkpoint_files import StoredTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of safetensors files that are mapped."""

_maps: dict[int, weakref.ref[mmap.mmap]] = {}
"""First address of every file that is mapped now."""


def map_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Tensors of safetensors files, without reading them.

    Args:
        stored: what the headers of the files say, see ``checkpoint_files.read_headers``.

    Returns:
        Tensors by name; one of a type that is not mapped, see :data:`DTYPES`, is read.

    Raises:
        ValueError: a file can't be mapped or read.
    """
    files = {tensor.file: None for tensor in stored.values()}
    buffers = {file: _map_file(file) for file in files}
    return {name: _view(name, tensor, buffers[tensor.file]) for name, tensor in stored.items()}


def forget(tensors: Iterable[Tensor]) -> int:
    """Give the memory of mapped tensors back, whole pages only; they are read again when they are used.

    Returns:
        Bytes given back; tensors that are not mapped count for nothing.
    """
    freed = 0
    for tensor in tensors:
        if type(tensor.data) is not Tensor:  # a subclass may have no memory of its own
            continue
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        for base, reference in list(_maps.items()):
            file = reference()
            if file is None or not base <= begin < base + len(file):
                continue
            first = -(-(begin - base) // mmap.PAGESIZE) * mmap.PAGESIZE
            count = (end - base) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if count > 0 and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED, first, count)
                freed += count
    return freed


@contextlib.contextmanager
def paged(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While active, each block forgets its mapped weights when it has run: one at a time is in memory."""

    def leave(block: nn.Module, args: tuple, output: object) -> None:
        forget(block.parameters())

    handles = [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scratch(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name in a folder: it is gone with the tensor, or the process, however that ends.

    Raises:
        OSError: there is no room for it in the folder, all of which is taken at once, or no file can be made there.
    """
    size = max(1, math.prod(shape) * dtype.itemsize)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as stream:
        # a write into a hole could fail later, and kill the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)
        content = mmap.mmap(stream.fileno(), size)
    return _register(content)[: math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def _map_file(file: Path) -> Tensor:
    """All bytes of a file."""
    try:
        with file.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be mapped into memory: {error}") from error
    return _register(content)


def _register(content: mmap.mmap) -> Tensor:
    """All bytes of a map, whose memory can be given back from now on."""
    data = torch.frombuffer(content, dtype=torch.uint8)
    base = data.data_ptr()
    _maps[base] = weakref.ref(content, lambda _: _maps.pop(base, None))
    return data


def _view(name: str, stored: StoredTensor, buffer: Tensor) -> Tensor:
    """One tensor of a mapped file; a copy where it does not lie as its type needs, or is of another type."""
    if stored.dtype not in DTYPES:
        with safe_open(stored.file, "pt") as file:
            return file.get_tensor(name)
    dtype = DTYPES[stored.dtype]
    end = stored.begin + stored.bytes
    raw = torch.from_numpy(
        buffer.numpy()[stored.begin : end]
    )  # a storage of its own, by which shards are made
    if stored.begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(stored.shape)
