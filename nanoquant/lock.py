"""One process at a time on a folder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from nanoquant.processes import first, on_first

logger = logging.getLogger(__name__)

_held: dict[Path, int | None] = {}
"""Folders that this process holds, and the handle by which; None where the system can't lock."""


@contextlib.contextmanager
def exclusive(folder: str | Path | None) -> Iterator[None]:
    """Keep other runs off a folder, which is made where it is absent; within one process calls may be nested.

    The system lets go when the process ends, however it ends; no file stays behind. None keeps nobody off, nor does a
    folder that can't be locked, which is said.

    Raises:
        ValueError: another process is at work there.
    """
    path = None if folder is None else Path(folder).resolve()
    if path is None or path in _held:
        yield
        return
    handle = on_first(lambda: _lock(path))
    _held[path] = handle if first() else None
    try:
        yield
    finally:
        _let_go(_held.pop(path))


def hold_again(folder: str | Path) -> None:
    """Make and lock a held folder anew where somebody removed or replaced it; nothing where it is not held.

    Raises:
        ValueError: another process is at work there now.
    """
    path = Path(folder).resolve()
    handle = _held.get(path)
    if handle is None or _is_at(handle, path):
        return
    logger.warning("%s was removed while a run was at work there; what it kept there is lost", path)
    new = _lock(path)
    _let_go(handle)
    _held[path] = new


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path is still the folder of a handle."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _let_go(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """Handle of the folder, locked; None, with a warning, where the system can't lock it."""
    handle = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
        import fcntl  # there is none on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"another process is at work in {path}; wait for it, or give another output"
        ) from None
    except (OSError, ImportError) as error:
        logger.warning("%s can't be locked (%s): start no second run there", path, error)
    return handle
