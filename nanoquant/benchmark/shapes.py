"""Shapes of published models, from their configurations alone: no weight is read or made.

The models are built on the meta device by transformers, so a shape is what transformers makes of a configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from nanoquant.architectures import decoder_from_structure
from nanoquant.budget import BudgetConfig, allocate_ranks
from nanoquant.checkpoint_files import read_json

LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "llama-2-70b": LLAMA_2
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "qwen3-8b": {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960}
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "demo": {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192}
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
"""What sets the shapes of published models; "demo" is SmolLM2-135M. A model more is an entry more."""


def model_config(
    name: str,
    layers: int | None = None,
    published: Mapping[str, dict[str, Any]] = CONFIGS,
) -> PreTrainedConfig:
    """Configuration of a published model or of a local folder.

    Args:
        name: a name of ``published``, a folder with a config.json, or such a file.
        layers: cut the model to its first layers; None keeps all.
        published: what sets the shapes of models by their names.

    Raises:
        ValueError: the name is neither, the file is no causal language model's, or layers is out of range.
    """
    config = _whole_config(name, published)
    if layers is None:
        return config
    most = config.num_hidden_layers
    if not 1 <= layers <= most:
        raise ValueError(f"layers must be 1 to {most}, the layers of {name}, got {layers}")
    config.num_hidden_layers = layers
    if kinds := vars(config).get("layer_types"):  # some families compute them
        config.layer_types = kinds[:layers]
    return config


def _whole_config(name: str, published: Mapping[str, dict[str, Any]]) -> PreTrainedConfig:
    """The configuration in its whole depth, without a quantization that it may state."""
    file = Path(name, "config.json") if Path(name).is_dir() else Path(name)
    if name in published:
        values = dict(published[name])
    elif file.is_file():
        values = read_json(file)
    else:
        near = difflib.get_close_matches(name.lower(), published, n=2)
        meant = f" (near: {', '.join(near)})" if near else ""
        raise ValueError(
            f"there is no model {name!r}{meant} and no {file}; give one of {', '.join(published)}, or a "
            "folder with a config.json"
        )
    values.pop("quantization_config", None)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), CONFIG_MAPPING, n=3)
        meant = f", which knows {', '.join(near)}" if near else ""
        raise ValueError(
            f"{file} is no configuration that transformers knows{meant}: its model_type is {kind!r}"
        )
    try:
        config = AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no configuration that transformers knows (model_type {kind!r}): {error}"
        ) from error
    config.dtype = torch.bfloat16
    return config


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The dense bf16 model on the meta device, in evaluation mode.

    Raises:
        ValueError: the configuration is not that of a causal language model.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{config.model_type} is no causal language model to transformers; give another"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )
    return model.eval()


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Full name of every linear of the decoder blocks, in order, to (d_out, d_in).

    Raises:
        ValueError: the blocks hold parts that can't be quantized.
    """
    linears = decoder_from_structure(model).linear_modules()
    shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
    plain = {name: isinstance(module, torch.nn.Linear) for name, module in linears.items()}
    return {name: shape if plain[name] else shape[::-1] for name, shape in shapes.items()}


def ranks_at(shapes: dict[str, tuple[int, int]], bits: float) -> dict[str, int]:
    """Rank of every linear as quantization at ``bits`` per weight would choose it."""
    return allocate_ranks(shapes, BudgetConfig(bits=bits))
