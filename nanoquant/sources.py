"""Dense and quantized models and their tokenizers, from folders that users name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from nanoquant.checkpoint import load
from nanoquant.checkpoint_files import (
    QUANT_METHOD,
    check_method,
    read_headers,
    read_json,
    shard_files,
)
from nanoquant.mapped import map_tensors
from nanoquant.model_folder import resolve_folder

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model"
).split()
GPU_NAMES = ("gpu", "cuda")


def find_model(name: str) -> Path:
    """The folder of a model, complete as far as a look at its files tells.

    Args:
        name: a folder, or "owner/name" on the Hugging Face Hub.

    Raises:
        ValueError: there is no such folder, or it lacks config, tokenizer or safetensors weights.
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
    shard_files(folder)
    return folder


def quantization_method(folder: Path) -> str | None:
    """The ``quant_method`` of a folder's config.json; None for a dense model."""
    found = read_json(folder / "config.json").get("quantization_config") or {}
    return found.get("quant_method")


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
    method = quantization_method(folder)
    check_method(method, str(folder))
    if method == QUANT_METHOD:
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
    return model.to(device).eval()


def _load_mapped(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A dense model whose weights are mapped, and what transformers tells about its tensors.

    Weights that transformers converts, to another dtype or layout, are in memory instead.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"{folder} holds a {config.model_type}, which is no causal language model to transformers"
        ) from None
    if getattr(kind, "config_class", None) is config.sub_configs.get("text_config", config):
        config = config.get_text_config()  # the language model of one that sees as well
    tensors = map_tensors(read_headers(shard_files(folder), None))
    stored = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    model, found = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype or config.dtype or stored,
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, found


def _is_float16(folder: Path) -> bool:
    """Whether a dense model is stored in float16; warns that it is going to be bfloat16."""
    config = read_json(folder / "config.json")
    if (config.get("dtype") or config.get("torch_dtype")) != "float16":
        return False
    logger.warning("%s is stored in float16; it is loaded and saved in bfloat16", folder)
    return True


def check_dense(folder: Path) -> None:
    """Raise ValueError if the model is quantized already."""
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
