"""What is estimated: a model without its weights, as ``quantize`` would load it, and the linears it would change."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from nanoquant.architectures import Decoder, find_skeleton_decoder
from nanoquant.budget import Shapes
from nanoquant.checkpoint_files import StoredTensor, read_headers, read_json, shard_files
from nanoquant.config import NanoQuantConfig
from nanoquant.hf_quantizer import FLOATS
from nanoquant.ranks import decoder_shapes
from nanoquant.sampling import roomy_cache
from nanoquant.sizes import tensor_bytes
from nanoquant.sources import read_config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedBlock:
    """What a block keeps of a text that is written."""

    numbers: int
    """Of a token, in keys and values together."""
    heads: int
    """Heads of keys, which heads of queries share."""
    window: int | None
    """Most tokens that are kept; None: all."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A dense model on the meta device and what of it is quantized."""

    name: str
    """As the user wrote it."""
    model: PreTrainedModel
    """Without weights, in the dtype in which they would be loaded."""
    decoder: Decoder
    """Its blocks."""
    chosen: range
    """Blocks that are quantized."""
    file_bytes: int
    """Bytes of the dense weight files; of a published architecture those of its tensors."""
    mapped: bool
    """Whether weights stay in their files, because nothing has to be converted."""

    @cached_property
    def shapes(self) -> Shapes:
        """(d_out, d_in) of the linears to quantize, by full name."""
        return decoder_shapes(self.decoder, self.chosen)

    @cached_property
    def all_shapes(self) -> Shapes:
        """The same of all blocks, those that stay dense too."""
        return decoder_shapes(self.decoder, range(len(self.decoder.blocks)))

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all parameters; tied ones once."""
        return tensor_bytes(self.model.parameters())

    @cached_property
    def parameters(self) -> int:
        """Parameters; tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def cached(self) -> list[CachedBlock]:
        """What blocks keep of a text, by a pass over a token of which only shapes are computed."""
        with FakeTensorMode(), no_init_weights(), torch.no_grad():
            model = type(self.model)(copy.deepcopy(self.model.config)).eval()
            cache, token = roomy_cache(model, 1), torch.zeros(1, 1, dtype=torch.long)
            model(input_ids=token, past_key_values=cache, use_cache=True)
        return [
            CachedBlock(
                layer.keys.numel() + layer.values.numel(),
                layer.keys.shape[1],
                getattr(layer, "sliding_window", None),
            )
            for layer in cache.layers
            if layer.is_initialized
        ]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model."""
        return self.model.dtype.itemsize

    @property
    def text_config(self) -> PreTrainedConfig:
        """Configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return self.text_config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Tokens that the head scores."""
        return self.text_config.vocab_size

    def names(self, block: int) -> list[str]:
        """Full names of the linears of a block, in order."""
        return [self.decoder.full_name(block, name) for name in self.decoder.linears[block]]

    def groups(self, block: int) -> list[list[str]]:
        """Full names of the linears of a block, those that read the same tensor together."""
        return [
            [self.decoder.full_name(block, name) for name in group]
            for group in self.decoder.groups[block]
        ]

    def block(self, block: int) -> nn.Module:
        """A decoder block."""
        return self.decoder.blocks[block]


def subject_of(
    name: str, model: PreTrainedModel, blocks: NanoQuantConfig, file_bytes: int, mapped: bool
) -> Subject:
    """What is estimated of a model on the meta device.

    Raises:
        ValueError: it holds what can't be quantized, or ``blocks`` chooses nothing.
    """
    model.requires_grad_(False)
    decoder = find_skeleton_decoder(model)
    return Subject(
        name, model, decoder, blocks.block_range(len(decoder.blocks)), file_bytes, mapped
    )


def subject_of_folder(folder: Path, config: NanoQuantConfig) -> Subject:
    """The model of a folder, from its config.json and the headers of its weight files.

    Raises:
        ValueError: they are not those of a dense causal language model, or a file is damaged.
    """
    files = shard_files(folder)
    stored = read_headers(files, None)
    loaded = read_config(folder)
    dtype = loading_dtype(folder, loaded, stored)
    floats = {FLOATS[t.dtype] for t in stored.values() if t.dtype in FLOATS}
    size = sum(file.stat().st_size for file in files)
    return subject_of(str(folder), skeleton_in(loaded, dtype), config, size, floats == {dtype})


def loading_dtype(
    folder: Path, config: PreTrainedConfig, stored: dict[str, StoredTensor]
) -> torch.dtype:
    """The dtype in which ``sources.load_model`` loads a model that is going to be trained."""
    raw = read_json(folder / "config.json")
    if (raw.get("dtype") or raw.get("torch_dtype")) == "float16":
        return torch.bfloat16
    first = next((FLOATS[t.dtype] for t in stored.values() if t.dtype in FLOATS), None)
    return config.dtype or first or torch.float32


def skeleton_in(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model on the meta device in a dtype, in evaluation mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
