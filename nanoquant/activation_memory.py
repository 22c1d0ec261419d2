"""Where activations lie: in memory as far as a limit goes, in files of a folder beyond it.

The limit decides nothing of what is computed. Nobody needs to tidy up: files have no names, and memory counts as free
again once nothing refers to its tensor.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanoquant.mapped import scratch
from nanoquant.units import amount, parse_bytes

SETTING = "run.activation_memory"


class ActivationMemory:
    """Makes room for activations.

    Args:
        limit: bytes of memory as a text, such as 4GB; None: all lie in memory.
        folder: of those beyond it.

    Raises:
        ValueError: there is a limit and no folder.
    """

    def __init__(self, limit: str | None = None, folder: str | Path | None = None) -> None:
        self.limit = None if limit is None else parse_bytes(limit, SETTING)
        self.folder, self.used = None if folder is None else Path(folder), 0
        if limit is not None and folder is None:
            raise ValueError(
                f"{SETTING}={limit} needs a folder for the activations beyond it: give work=..., or leave it out"
            )

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized tensor in the dtype of another one, and on its device unless it lies in a file.

        Raises:
            ValueError: the folder can't take it; says how much was needed and where.
        """
        size = math.prod(shape) * like.dtype.itemsize
        if self.limit is not None and self.used + size > self.limit:
            try:
                return scratch(self.folder, shape, like.dtype)
            except OSError as error:
                raise ValueError(
                    f"{amount(size)} of activations beyond {SETTING} ({amount(self.limit)}) can't be written in "
                    f"{self.folder}: {error.strerror or error}; make room there, or raise {SETTING}"
                ) from error
        found = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        self.used += size
        weakref.finalize(found, self._free, size)
        return found

    def _free(self, size: int) -> None:
        self.used -= size
