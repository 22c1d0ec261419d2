"""Writing a model card, and uploading a checkpoint to a hub; both look at the folder first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from nanoquant.checkpoint_files import verify_folder
from nanoquant.commit import sync
from nanoquant.hub.card import CARD, MARK, known_of, model_card, renamed
from nanoquant.tracking.folder import read_run, run_folder

REFUSED = {
    401: "the hub does not know you: make a token that may write and log in with hf auth login, or set HF_TOKEN",
    403: "your token may not write there: take a name of your own, or a token with write access",
    404: "there is no such place on the hub, or your token may not see it",
}


def write_card(
    folder: str | Path,
    record: dict[str, Any] | None = None,
    license: str | None = None,
    anew: bool = False,
) -> Path:
    """Write README.md of a checkpoint; licence and language of the one that is there are kept.

    A generated one whose run is not at hand keeps its text, which nothing here could tell again.

    Args:
        folder: the checkpoint.
        record: run.json of its run; None: that of the folder beside it, if there is one.
        license: identifier of a licence in the place of the dense model's.
        anew: keep nothing of a generated card but licence and language.

    Raises:
        ValueError: the folder is no complete checkpoint of this library.
    """
    folder = Path(folder)
    verify_folder(folder)
    record = read_run(run_folder(folder)) if record is None else record
    text = model_card(known_of(folder, record, license, anew))
    return _put(folder, text)


def _put(folder: Path, text: str) -> Path:
    """Replace the card of a folder, whole or not at all."""
    partial = folder / f"{CARD}.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / CARD)
    sync(folder)
    return folder / CARD


def push(folder: str | Path, name: str, private: bool = False) -> str:
    """Upload a checkpoint with its card to a repository of the hub, which is made if need be.

    Args:
        folder: a complete checkpoint; a card that was not generated here is replaced by one. The card then calls it
            by ``name``.
        name: owner/name.
        private: whether a new repository is.

    Returns:
        Its address.

    Raises:
        ValueError: the folder is no complete checkpoint, or the name is none.
        OSError: the hub refuses, or can't be reached; with what to do.
    """
    folder = Path(folder)
    verify_folder(folder)
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name on a hub, such as owner/name: {error}") from None
    if not (folder / CARD).is_file() or f"- {MARK}" not in (folder / CARD).read_text("utf-8"):
        write_card(folder)
    card = (folder / CARD).read_text("utf-8")
    if card != (called := renamed(card, folder.resolve().name, name)):
        _put(folder, called)
    api = HfApi(library_name=MARK)
    try:
        place = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=place.repo_id,
            commit_message="Quantized by nanoquant",
            ignore_patterns=[".*", "*.partial"],
        )
    except HTTPError as error:  # refused, or not reached at all
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = REFUSED.get(status, f"{error}; look at the connection and HF_ENDPOINT")
        raise OSError(f"{name} could not be uploaded: {why}") from error
    return str(place)
