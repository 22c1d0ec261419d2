"""Files in their place for good: whole at every moment, on the disk before anything goes on that relies on them."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def commit(partial: Path, path: Path) -> None:
    """Rename a written file to its place, where a power cut leaves it or what was there before, whole."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the entries of a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # file systems may not sync folders
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has all that is in a folder and below it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def refused(path: Path, error: Exception) -> OSError:
    """What to raise where the disk refuses unfinished work."""
    reason = getattr(error, "strerror", None) or error
    return OSError(
        f"{path} can't be written ({reason}), so the run ends here; what was kept before is whole: make room, and the "
        "same command goes on from there"
    )
