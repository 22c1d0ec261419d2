"""Adapters of peft beside packed weights: their folders, and what must fit before one is loaded.

An adapter is a normal peft folder, which ``PeftModel.from_pretrained`` reads as well. A file of ours beside it says for
which checkpoint it was trained, since one of other bits has the same shapes and another error to make good.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from nanoquant.checkpoint_files import read_json
from nanoquant.hf_quantizer import shorten
from nanoquant.json_files import write_json
from nanoquant.output_folder import check_output_folder
from nanoquant.stored_tensors import read_header

if TYPE_CHECKING:
    from peft import PeftModel

LEAST_PEFT = (0, 19)
INSTALL = "pip install 'nanoquant[tune]'"
CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "nanoquant.json"
PREFIX = "base_model.model."


def require_peft() -> None:
    """Make sure that peft can be used.

    Raises:
        ValueError: it is not installed, or too old.
    """
    least = ".".join(map(str, LEAST_PEFT))
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"adapters need peft {least} or newer, which is not installed: {INSTALL}"
        ) from None
    if tuple(map(int, version.split(".")[:2])) < LEAST_PEFT:
        raise ValueError(f"adapters need peft {least} or newer, got {version}: {INSTALL}")
    importlib.import_module("peft")
    if "nanoquant.lora" not in sys.modules:
        raise ValueError(
            f"peft {version} lacks what packed linears extend, see the warning of its import; take another: {INSTALL}"
        )


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Write the adapter of a model as a peft folder, with the checkpoint that it was trained on.

    Raises:
        ValueError: the folder is not empty.
    """
    folder = check_output_folder(folder)
    model.save_pretrained(folder)
    about = {"checkpoint_id": checkpoint_id(model), "source": model.get_base_model().name_or_path}
    write_json(str(folder / OWN), about)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = False) -> PeftModel:
    """Put an adapter on a packed model: ``PeftModel.from_pretrained`` after :func:`check_adapter`.

    Args:
        model: as loaded; its linears are wrapped in place.
        folder: of a peft adapter.
        trainable: whether it goes on training.

    Raises:
        ValueError: peft is missing or too old, or the adapter is not of this model.
    """
    require_peft()
    check_adapter(model, Path(folder))
    from peft import PeftModel

    # computing in the stored dtype gives the logits that it was saved with
    options = {"is_trainable": trainable, "autocast_adapter_dtype": trainable}
    try:
        adapted = PeftModel.from_pretrained(model, folder, **options)
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:  # peft checks little of what a file says
        raise ValueError(
            f"the adapter {folder} is damaged or of another kind than LoRA ({type(error).__name__}: {error}); copy it "
            "again"
        ) from error
    layers = {n for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")}
    if lacking := sorted(layers - adapted_layers(Path(folder) / WEIGHTS)):
        adapted.unload()
        raise ValueError(
            f"the adapter {folder} has nothing for {shorten(lacking)}; load the model it was made for"
        )
    return adapted


def check_adapter(model: nn.Module, folder: Path) -> None:
    """Compare an adapter's files with a model before anything of it is changed.

    Raises:
        ValueError: it is not there, or was made for other layers or another checkpoint; names both.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} is no adapter: it lacks {CONFIG} or {WEIGHTS}; give the folder that save_adapter wrote"
        )
    source = read_json(folder / CONFIG).get("base_model_name_or_path")
    origin = f"the adapter {folder} was made for {source or 'an unnamed model'}"
    present = {name for name, _ in model.named_modules()}
    foreign = sorted(adapted_layers(folder / WEIGHTS) - present)
    if foreign:
        raise ValueError(
            f"{origin}, whose layers {shorten(foreign)} this model does not have; load the model it was made for"
        )
    check_same_checkpoint(model, folder, origin)


def check_same_checkpoint(model: nn.Module, folder: Path, origin: str) -> None:
    """Refuse an adapter of another checkpoint, where both are known and the model is still packed.

    Raises:
        ValueError: tells both.
    """
    made = read_json(folder / OWN).get("checkpoint_id") if (folder / OWN).is_file() else None
    here = checkpoint_id(model)
    if made and here and made != here:
        raise ValueError(
            f"{origin} with the checkpoint_id {made}, but this checkpoint is {here}: other signs or scales; load the "
            f"one it was made for, or delete {folder / OWN} to use it all the same"
        )


def checkpoint_id(model: nn.Module) -> str | None:
    """Digest of the checkpoint that a model was loaded from; None where it comes from elsewhere."""
    return getattr(getattr(model.config, "quantization_config", None), "checkpoint_id", None)


def adapted_layers(file: Path) -> set[str]:
    """Names of the layers that an adapter's file has low-rank matrices for.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    tensors, _ = read_header(file)
    layers = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    return {name.removeprefix(PREFIX) for name in layers}
