"""Recipe: what a checkpoint tells of how it was made, in its config.json."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import nanoquant


def make_recipe(
    source: str,
    text: str | Sequence[str],
    bits: float,
    config: dict[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """How a checkpoint was made.

    Args:
        source: the dense model as the user named it: a folder or a Hub name.
        text: names of the texts.
        bits: a weight of the quantized linears.
        config: all settings.
        seconds: of each phase.
    """
    return {
        "source": source,
        "base_model": hub_name(source),
        "text": text,
        "bits": bits,
        "config": config,
        "seconds": dict(seconds),
        "versions": versions(),
    }


def hub_name(source: str) -> str | None:
    """``source`` where it is the name of a model on a hub, and no folder here."""
    on_hub = (
        source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).exists()
    )
    return source if on_hub else None


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {
        "nanoquant": nanoquant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
