"""Folders that are written to: whether they can be, said before anything is computed, and what a kill left in them."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

PARTIAL = ".partial-"
"""Beginning of the name of a folder, inside a checkpoint's, that has the files which are not complete yet."""


def torn_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds only what a process that was killed while saving has left there.

    It was empty before, ``config.json`` comes last, and a folder :data:`PARTIAL` is there as long as files are missing.
    """
    folder = Path(folder)
    return not (folder / "config.json").exists() and any(folder.glob(f"{PARTIAL}*"))


def check_output_folder(folder: str | Path) -> Path:
    """The folder as a path, if it can be made, or is there and empty, so nothing is overwritten.

    Raises:
        ValueError: it or a folder above it is a file or can't be written to, or it is not empty.
    """
    folder = Path(folder)
    check_can_be_made(folder, f"the output folder {str(folder)!r}")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"the output folder {str(folder)!r} is not empty; give a new or empty folder"
        )
    return folder


def check_can_be_made(folder: Path, what: str) -> None:
    """Raise ValueError, beginning with ``what``, unless files can be put in ``folder``, which may be made first."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise ValueError(f"{what} can't be made: {str(nearest)!r} is a file; give a folder")
    check_writable(nearest, what)


def check_writable(folder: Path, what: str) -> None:
    """Raise ValueError, beginning with ``what``, unless a new entry can be made in ``folder``.

    It makes one and removes it: permission bits tell nothing of read-only file systems, nor to root.
    """
    try:
        with TemporaryDirectory(prefix=".nanoquant-", dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{what} can't be written: {folder.absolute()} refuses it ({error.strerror}); "
            "choose another place or free this one"
        ) from error
