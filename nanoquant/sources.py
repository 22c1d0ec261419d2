"""Dense and quantized models and their tokenizers, from folders that users name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from nanoquant.checkpoint import load
from nanoquant.checkpoint_files import (
    ADAPTER_FILE,
    QUANT_METHOD,
    check_counts,
    check_method,
    read_headers,
    read_json,
    shard_files,
)
from nanoquant.mapped import map_tensors
from nanoquant.model_folder import resolve_folder
from nanoquant.stored_tensors import StoredTensor

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model"
).split()
GPU_NAMES = ("gpu", "cuda")
DENSE = ("BF16", "F32", "F16")
"""How safetensors name the types of dense weights."""


def find_model(name: str) -> Path:
    """The folder of a model, complete as far as a look at its files tells.

    Args:
        name: a folder, or "owner/name" on the Hugging Face Hub.

    Raises:
        ValueError: there is no such folder, it lacks config, tokenizer or safetensors weights, its configuration can't
            be used, or it is of another quantization method.
    """
    folder = resolve_folder(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json; give the folder of a Hugging Face causal language model"
        )
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's own there"
        )
    stored = read_headers(shard_files(folder), None)
    check_counts(read_json(folder / "config.json"), len(stored), folder)
    check_method(quantization_method(folder), str(folder))
    read_config(folder)
    if (folder / GENERATION_CONFIG_NAME).exists():
        read_json(folder / GENERATION_CONFIG_NAME)
    return folder


def quantization_method(folder: Path) -> str | None:
    """The ``quant_method`` of a folder's config.json; None for a dense model."""
    found = read_json(folder / "config.json").get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder / 'config.json'} has quantization_config {found!r}; it must be an object"
        )
    return found.get("quant_method")


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a folder; none of its code is run.

    Raises:
        ValueError: transformers knows no such model, or a value is none that it takes.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every configuration checks its values in a way of its own
        raise ValueError(f"{folder / 'config.json'} can't be used: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; none of its code is run."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"the tokenizer of {folder} can't be read: {error}") from error


def load_model(folder: Path, device: torch.device, trainable: bool = False) -> PreTrainedModel:
    """A quantized or dense model in the dtype it is stored in, in evaluation mode.

    Args:
        folder: as :func:`find_model` gave it.
        device: where it goes.
        trainable: load a float16 model as bfloat16, with a warning: gradients overflow float16.

    Raises:
        ValueError: the checkpoint is damaged or incomplete; names what is missing.
    """
    if quantization_method(folder) == QUANT_METHOD:
        return load(folder).to(device).eval()
    model, found = _load_mapped(
        folder, torch.bfloat16 if trainable and _is_float16(folder) else None
    )
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"{folder} lacks {len(lacking)} tensors of {type(model).__name__}, or has them in "
            f"another shape: {', '.join(lacking[:5])}; it is incomplete or of another model"
        )
    _check_unused(folder, model, found["unexpected_keys"])
    return model.to(device).eval()


def _load_mapped(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A dense model whose weights are mapped, and what transformers tells about its tensors.

    Weights that transformers converts, to another dtype or layout, are in memory instead.
    """
    config = read_config(folder)
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"{folder} holds a {config.model_type}, which is no causal language model to transformers"
        ) from None
    if getattr(kind, "config_class", None) is config.sub_configs.get("text_config", config):
        config = config.get_text_config()  # the language model of one that sees as well
    stored = read_headers(shard_files(folder), None)
    check_stored(stored)
    tensors = map_tensors(stored)
    first = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    model, found = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype or config.dtype or first,
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, found


def check_stored(stored: dict[str, StoredTensor]) -> None:
    """Raise ValueError where weights are in another type than those of dense models."""
    strange = {
        tensor.dtype
        for name, tensor in stored.items()
        if tensor.dtype not in DENSE and (tensor.dtype.startswith("F") or name.endswith(".weight"))
    }
    if strange:
        raise ValueError(
            f"tensors are stored as {', '.join(sorted(strange))}; allowed: {', '.join(DENSE)}; convert the model to "
            "bfloat16"
        )


def _check_unused(folder: Path, model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse a folder that has more blocks, or more weights in them, than its model; warn of what else is not used."""
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    inside = re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, lists))})\.(\d+)\.")
    found = {name: inside.search(name) for name in names} if lists else {}
    lost = [
        name
        for name, place in found.items()
        if place and (int(place[2]) >= lists[place[1]] or name.endswith(".weight"))
    ]
    if lost:
        raise ValueError(
            f"{folder} has {len(lost)} tensors that {type(model).__name__} has no place for by its config.json, the "
            f"first is {min(lost)}; give the config.json that belongs to these weights"
        )
    if names:
        logger.warning(
            "%s: %d tensors are not used: %s", folder, len(names), ", ".join(sorted(names)[:5])
        )


def _is_float16(folder: Path) -> bool:
    """Whether a dense model is stored in float16; warns that it is going to be bfloat16."""
    config = read_json(folder / "config.json")
    if (config.get("dtype") or config.get("torch_dtype")) != "float16":
        return False
    logger.warning("%s is stored in float16; it is loaded and saved in bfloat16", folder)
    return True


def check_dense(folder: Path) -> None:
    """Raise ValueError if the model is quantized already, or an adapter lies beside it."""
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder} holds {ADAPTER_FILE}: merge the adapter into the model and save that, or move it elsewhere"
        )
    method = quantization_method(folder)
    if method is not None:
        raise ValueError(
            f"{folder} is quantized already (quant_method {method!r}); quantize the dense model"
        )


def device_of(accelerator: str) -> torch.device:
    """Device for a Lightning accelerator name; auto is a GPU if there is one.

    Raises:
        ValueError: the name is unknown, or a GPU is asked for and there is none.
    """
    if accelerator not in ("auto", "cpu", *GPU_NAMES):
        raise ValueError(
            f"the accelerator must be auto, cpu, {' or '.join(GPU_NAMES)}, got {accelerator!r}"
        )
    available = torch.cuda.is_available()
    if accelerator in GPU_NAMES and not available:
        raise ValueError(f"accelerator {accelerator!r} was asked for, but torch finds no GPU")
    return torch.device("cuda" if accelerator != "cpu" and available else "cpu")


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder, headers included."""
    return sum(file.stat().st_size for file in shard_files(folder))
