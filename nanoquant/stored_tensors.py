"""Headers of safetensors files: which tensors there are, and where; nothing else of a file is read.

Files come from anywhere, so nothing that a header says is believed before it is checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoquant.json_files import parse_json

LONGEST_HEADER = 100_000_000
"""Bytes of a header of a safetensors file, as safetensors itself has it."""
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of an element of every dtype of safetensors files."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; dtype as safetensors spells it, "BF16", and where in the file it begins."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    begin: int


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file, from its header alone.

    What it takes is what safetensors itself takes: tensors of whole numbers of elements, one behind the other.

    Raises:
        ValueError: the file is missing, is not a safetensors file, or is shorter or longer than its
            header says.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy the whole checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(
                f"{file} is truncated or not a safetensors file: it has {size} bytes, but its "
                f"header alone asks for {8 + length}; copy it again"
            )
        if length > LONGEST_HEADER:
            raise ValueError(
                f"{file} is not a safetensors file: its header has {length} bytes, more than {LONGEST_HEADER}"
            )
        try:
            header = parse_json(stream.read(length), _unique)
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata is no text")
            tensors = {
                name: _stored_tensor(file, 8 + length, name, entry)
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not a safetensors file: its header can't be read ({error})"
            ) from error
    _check_places(file, tensors, 8 + length, size)
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose names differ; readers do not agree on which of two equal ones counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found


def _stored_tensor(file: Path, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    """One tensor of a header whose data start at byte ``start`` of the file."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} and offsets {begin}, {end}")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    if math.prod(shape) * DTYPE_BITS[dtype] != 8 * (end - begin):
        raise ValueError(f"{name} is {dtype} of shape {shape}, but has {end - begin} bytes")
    return StoredTensor(file, dtype, tuple(shape), end - begin, start + begin)


def _check_places(file: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """Raise ValueError unless the tensors fill a file from byte ``start`` to its end, one behind the other."""
    end = max((tensor.begin + tensor.bytes for tensor in tensors.values()), default=start)
    if size != end:
        raise ValueError(f"{file} is damaged: expected {end} bytes, found {size}; copy it again")
    for name, tensor in sorted(tensors.items(), key=lambda pair: (pair[1].begin, pair[1].bytes)):
        if tensor.begin != start:
            raise ValueError(
                f"{file} is damaged: {name} begins at byte {tensor.begin}, but what is before it ends at {start}"
            )
        start += tensor.bytes
