"""The folder of a model that a user names: a local one, or what a hub has under that name."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from nanoquant.checkpoint_files import WEIGHT_SUFFIXES


def resolve_folder(name: str | Path, weights: bool = True) -> Path:
    """A local folder for ``name``: the folder itself, or a Hub repository's cached snapshot.

    Args:
        name: a folder, or "owner/name" on the Hugging Face Hub.
        weights: whether a snapshot must hold safetensors files; other weight formats are never
            fetched.

    Raises:
        ValueError: no such folder, and not a repository that can be fetched.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or path.parent.is_dir():
        siblings = (
            [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        )
        near = difflib.get_close_matches(path.name, siblings)
        hint = f"; near names there: {', '.join(near)}" if near else ""
        raise ValueError(f"there is no folder {str(name)!r}{hint}; a model on a hub is owner/name")
    from huggingface_hub import snapshot_download

    skipped = [
        f"*{suffix}" for suffix in WEIGHT_SUFFIXES if not (weights and suffix == ".safetensors")
    ]
    try:
        return Path(snapshot_download(str(name), ignore_patterns=skipped))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name)!r} is not a folder here, and the Hugging Face Hub did not give it: {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """What a user does about a hub that does not give a repository."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return "its owner grants access to it: ask on its page there, then log in with hf auth login or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            "there is no model of that name, or it is private: look at the name, and where it is private log in with "
            "hf auth login or set HF_TOKEN"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "it can't be reached, and nothing of it was fetched before: look at the connection, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, or give a folder"
        )
    return str(error)
