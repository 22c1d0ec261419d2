"""The weight files of a checkpoint, to the byte, before there is one: tensors in shards, and headers.

The quantized model is built on the meta device as it is when a checkpoint is loaded. safetensors writes tensors by
falling width of their type, then by name, after a header in JSON that is filled up to 8 bytes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from nanoquant.checkpoint import LARGEST_SHARD
from nanoquant.checkpoint_files import CHECKPOINT_KEY, INDEX_FILE, SINGLE_FILE, StoredTensor
from nanoquant.embedding import EmbeddingConfig
from nanoquant.hf_quantizer import swap_modules
from nanoquant.mapped import DTYPES
from nanoquant.methods import Size, entry_of
from nanoquant.model_embeddings import find_embeddings, swap_embeddings
from nanoquant.packed_layers import parts_of
from nanoquant.sizes import Sizes, measure_sizes

WIDTHS = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""Types as safetensors orders them; wider ones come first in a file."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SCALES = "BF16"
"""Type of stored scales."""
METADATA = {"format": "pt", CHECKPOINT_KEY: "0" * 32}
"""What every shard says besides its tensors; the id has that many digits."""


@dataclass(frozen=True)
class WeightFiles:
    """What a checkpoint's weights take."""

    files: dict[str, int]
    """Name of every file, the index of shards too, to its bytes."""
    sizes: Sizes
    """As ``read_sizes`` gives them for the checkpoint."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(size for name, size in self.files.items() if name != INDEX_FILE)

    @property
    def all_bytes(self) -> int:
        """The same with the index of shards."""
        return sum(self.files.values())


def weight_files(
    dense: PreTrainedModel,
    sizes: Mapping[str, Size],
    embedding: EmbeddingConfig,
    shard: int | str = LARGEST_SHARD,
) -> WeightFiles:
    """Files of the checkpoint that a dense model on the meta device becomes.

    Args:
        dense: stays as it is.
        sizes: ranks or codebooks of the linears that are packed, by full name.
        embedding: storage of embedding and head.
        shard: largest shard, in bytes or as "5GB".
    """
    model = quantized_skeleton(dense, sizes, embedding)
    tensors = stored_tensors(model)
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=SINGLE_FILE.replace(".s", "{suffix}.s"), max_shard_size=shard
    )
    files = {
        name: header_length({key: tensors[key] for key in keys})
        + sum(tensors[key].nbytes for key in keys)
        for name, keys in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        files[INDEX_FILE] = len(json.dumps(index, indent=2, sort_keys=True)) + 1
    return WeightFiles(files, measure_sizes(model))


def quantized_skeleton(
    dense: PreTrainedModel, sizes: Mapping[str, Size], embedding: EmbeddingConfig
) -> PreTrainedModel:
    """A copy of a dense model on the meta device whose linears and tables are packed."""
    model = copy.deepcopy(dense)
    scale = StoredTensor(Path(), SCALES, (), 0, 0)
    entries = {name: entry_of(size) for name, size in sizes.items()}
    parts = {name: sum(parts_of(entry), ()) for name, entry in entries.items()}
    swap_modules(model, entries, {f"{n}.{part}": scale for n in parts for part in parts[n]})
    if embedding.bits != 16:
        entry = {"bits": embedding.bits}
        entry |= {"group_size": embedding.group_size} if embedding.bits == 4 else {}
        swap_embeddings(model, dict.fromkeys(find_embeddings(model), entry))
    return model


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes of a model: its state in order, each tied tensor under its main name."""
    state = model.state_dict(keep_vars=True)
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = model.all_tied_weights_keys
    kept = {
        name: tensor.data
        for name, tensor in state.items()
        if name not in ignored and not (name in tied and state.get(tied[name]) is tensor)
    }
    return kept


def header_length(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file before its data."""
    order = sorted(tensors, key=lambda name: (-WIDTHS.index(NAMES[tensors[name].dtype]), name))
    header, begin = {"__metadata__": METADATA}, 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8
