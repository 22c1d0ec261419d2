"""The commands ``import`` and ``export``."""

from __future__ import annotations

from nanoquant.console import say
from nanoquant.interchange.convert import export_words, import_words


def import_command(model: str, output: str, dense: str) -> None:
    """Make a checkpoint from a packed state of the published code or its llama.cpp port.

    Args:
        model: .pt or .safetensors file, or folder of safetensors, with U_packed and V_packed of each linear.
        output: new or empty folder for the checkpoint.
        dense: folder or Hub name of the dense model, for configuration and tokenizer.

    Raises:
        ValueError: the state is of another kind, holds pickled code, or is not of this model.
    """
    found = import_words(model, output, dense)
    stay = f", {found['dense']} more of the decoder are dense in it" if found["dense"] else ""
    say(f"{output}: {found['quantized']} linears{stay}")


def export_command(model: str, output: str) -> None:
    """Write the signs of a checkpoint as 32-bit words in safetensors, as the llama.cpp port reads them.

    Args:
        model: folder or Hub name of a checkpoint of binary factors.
        output: new or empty folder.

    Raises:
        ValueError: it holds codebooks, or an embedding of fewer than 16 bits.
    """
    say(f"{output}: {len(export_words(model, output))} files")
