"""TensorFile: tensors and values of unfinished work on the disk, whole at every moment, with what they belong to."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanoquant.commit import commit, refused
from nanoquant.json_files import parse_json
from nanoquant.lock import hold_again
from nanoquant.processes import first
from nanoquant.shards import gather_to_first, is_shard, save_parts

VALUES = "values"
TORN = ".partial"
"""Folder, beside a file, of what is being written; what a killed process leaves there is of no use."""


class Content(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class TensorFile:
    """A safetensors file that belongs to settings: read only with the same ones, replaced whole or not at all.

    Args:
        path: of the file; None keeps nothing.
        settings: all that decides what its tensors are, as text by name.
        what: what it holds, for messages, such as "windows".
    """

    def __init__(self, path: Path | None, settings: Mapping[str, str], what: str) -> None:
        self.path, self.settings, self.what = path, dict(settings), what
        self.written = time.monotonic()

    def read(self, wanted: Callable[[str], bool] = lambda name: True) -> Content | None:
        """Tensors of wanted names, and values; None where there is no file yet.

        Raises:
            ValueError: the file is damaged or belongs to other settings, which are named.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                found = dict(file.metadata() or {})
                values = parse_json(found.pop(VALUES, "{}"))
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names if wanted(name)}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{self.path} can't be read ({error}); delete it, and {self.what} will be made anew"
            ) from None
        other = [
            f"{name} {found.get(name)!r}, not {value!r}"
            for name, value in self.settings.items()
            if found.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{self.path} holds {self.what} of {'; '.join(other)}; delete it, or give another place"
            )
        return Content(tensors, values)

    def values(self) -> dict[str, Any]:
        """The values alone; empty where there is no file yet. Errors as of :meth:`read`."""
        content = self.read(lambda name: False)
        return content.values if content else {}

    def write(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
        """Replace the file; of several processes the first one alone writes, and shards are gathered one at a time.

        Raises:
            OSError: the disk refuses it; what was there before is whole.
            ValueError: somebody removed the folder, and another process is at work there now.
        """
        metadata = self.settings | ({VALUES: json.dumps(values)} if values else {})
        if self.path is not None and any(map(is_shard, tensors.values())):
            gather_to_first(
                tensors.values(),
                lambda parts: self._replace(lambda p: save_parts(p, tensors, parts, metadata)),
            )
        elif self.path is not None and first():
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            self._replace(lambda partial: save_file(plain, partial, metadata))
        self.written = time.monotonic()

    def _replace(self, save: Callable[[Path], None]) -> None:
        """Put what ``save`` writes in the place of the file; errors as of :meth:`write`."""
        hold_again(self.path.parent)
        partial = (
            self.path.parent / TORN / self.path.name
        )  # safetensors writes files of its own beside it
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            save(partial)
            commit(partial, self.path)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                partial.unlink()
            raise refused(self.path, error) from error
        finally:
            with suppress(OSError):  # another file may be on its way there
                partial.parent.rmdir()

    def delete(self) -> None:
        """Delete the file where there is one; what can't be deleted stays, and is read or written over.

        Of several processes the first one does.
        """
        if self.path is not None and first():
            with suppress(OSError):
                self.path.unlink()

    def age(self) -> float:
        """Seconds since the last write, or since this object was made."""
        return time.monotonic() - self.written


def forget_torn(folder: Path) -> None:
    """Delete what killed processes were writing in a folder; nobody else may be writing there."""
    shutil.rmtree(folder / TORN, ignore_errors=True)
