"""The commands ``card`` and ``push``."""

from __future__ import annotations

from nanoquant.console import say
from nanoquant.hub.publish import push, write_card


def card_command(model: str, license: str | None = None) -> None:
    """Write the model card of a checkpoint: what it is, its figures, how it was made and how to run it.

    Args:
        model: folder of a quantized model.
        license: identifier of a licence, such as apache-2.0, in the place of the dense model's.

    Raises:
        ValueError: the folder is not a complete checkpoint.
    """
    say(str(write_card(model, license=license)))


def push_command(model: str, name: str, private: bool = False) -> None:
    """Upload a checkpoint with its model card to the Hugging Face Hub, or the hub that HF_ENDPOINT names.

    Args:
        model: folder of a quantized model.
        name: owner/name there; made if need be.
        private: whether a new repository is private.

    Raises:
        ValueError: the folder is not a complete checkpoint, or the name is none.
    """
    say(push(model, name, private))
