"""Tensors that ``torch.save`` wrote, read without running code, and in no more memory than the file has bytes."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_pickle(file: Path) -> Any:  # noqa: ANN401
    """What a ``.pt`` holds: containers, numbers, and tensors on the CPU.

    Raises:
        ValueError: it holds pickled code, is damaged, is compressed, or tells of tensors that it has no bytes for.
        OSError: it can't be read.
    """
    try:
        _check_records(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        _check_tensors(found)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds pickled code besides tensors, which is never run here, or is no file of torch.save: save "
            f"the state dict alone{_reason(error)}"
        ) from None
    except OSError:
        raise
    except Exception as error:  # what is damaged in a pickle shows in almost every kind
        raise ValueError(f"{file} is damaged or no file of tensors: {error}") from None
    return found


def _reason(error: pickle.UnpicklingError) -> str:
    """What the reader stumbled over, without torch's advice to run the code."""
    reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return f" ({reason.partition('. ')[0].strip()})" if reason else ""


def _check_records(file: Path) -> None:
    """Raise ValueError if reading the records of an archive would take more memory than the file has bytes."""
    if not zipfile.is_zipfile(file):
        return  # the older format, whose tensors are read from the file one after another
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed, as torch.save never writes them")
    told, size = sum(record.file_size for record in records), file.stat().st_size
    if told > size:
        raise ValueError(f"its records claim {told:,} bytes, but it has {size:,}")


def _check_tensors(found: Any) -> None:  # noqa: ANN401
    """Raise ValueError where tensors are no plain ones, or would be larger than what is stored of them."""
    items: Iterable[tuple[Any, Any]] = (
        found.items() if isinstance(found, Mapping) else [("", found)]
    )
    tensors = [(name, value) for name, value in items if isinstance(value, Tensor)]
    for name, tensor in tensors:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(
                f"{name or 'it'} is no plain tensor: {type(tensor).__name__}, {tensor.layout}"
            )
    views = {(t.data_ptr(), t.dtype, t.shape): t.nbytes for _, t in tensors}  # tied ones are one
    stored = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for _, t in tensors)}
    if sum(views.values()) > sum(stored.values()):
        raise ValueError(
            f"its tensors have {sum(views.values()):,} bytes, but {sum(stored.values()):,} are stored of them"
        )
