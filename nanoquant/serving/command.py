"""The command ``serve``: a checkpoint behind ``transformers serve``, whose flags and endpoints are its own.

Another process than this one does not know the format: ``transformers serve OUT`` alone refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nanoquant.checkpoint_files import verify_folder
from nanoquant.console import note, say
from nanoquant.sources import find_model, load_tokenizer

HELP = """usage: nanoquant serve OUT [flags of transformers serve]

Check the checkpoint OUT and hand it to "transformers serve", which answers in the protocol of OpenAI.
It needs: pip install 'nanoquant[serve]'. Flags of transformers serve:
"""


def serve_command(arguments: Sequence[str]) -> None:
    """Serve a checkpoint until the process is stopped.

    Args:
        arguments: the folder or Hub name of the model, then flags of ``transformers serve``, handed on as they are.

    Raises:
        ValueError: the folder is not a complete checkpoint with a tokenizer, its name can't be handed on, or packages
            of the server are missing.
    """
    if {"-h", "--help"} & set(arguments):
        say(HELP)
        return _hand_over(["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "serve needs a checkpoint before its flags: nanoquant serve OUT --port 8000"
        )
    name = check_served(arguments[0])
    check_packages()
    note(f"requests name the model {name!r}, or none")
    return _hand_over([name, *arguments[1:]])


def check_served(model: str) -> str:
    """The name by which the server and its clients call a checkpoint.

    Raises:
        ValueError: it is not a complete checkpoint with a tokenizer, or the server would misread its name.
    """
    name = str(Path(model))
    if "@" in name or name.endswith(".gguf"):
        raise ValueError(
            f"transformers serve takes '@' for a revision and '.gguf' for a file, so it can't serve {name!r}; "
            "rename the folder"
        )
    folder = find_model(name)
    verify_folder(folder)
    if not load_tokenizer(folder).chat_template:
        note(
            f"{name} has no chat template, so /v1/completions answers, but /v1/chat/completions fails"
        )
    return name


def check_packages() -> None:
    """Raise ValueError where the server lacks a package."""
    from transformers.utils.import_utils import is_accelerate_available, is_serve_available

    if not (is_serve_available() and is_accelerate_available()):
        raise ValueError(
            "transformers serve lacks packages here (fastapi, uvicorn, openai, pydantic or accelerate): "
            "pip install 'nanoquant[serve]'"
        )


def _hand_over(arguments: list[str]) -> None:
    """Become ``transformers serve``; it leaves the process, with a code of its own, when it ends."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.transformers import app

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # /v1/models lists it, and fails without
    app(["serve", *arguments], prog_name="nanoquant")
