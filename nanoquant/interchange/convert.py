"""From a state of words to a checkpoint of this library, and back to safetensors of words."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nanoquant.architectures import decoder_from_structure, linear_shape
from nanoquant.checkpoint import load, mark_quantized, move_in, save_pretrained
from nanoquant.checkpoint_files import copy_other_files
from nanoquant.embedding import QuantizedEmbedding, QuantizedHead
from nanoquant.estimate.subject import skeleton_in
from nanoquant.interchange.read import FLOATS, Signs, read_state, split_state
from nanoquant.interchange.words import to_words
from nanoquant.json_files import write_json
from nanoquant.model_folder import resolve_folder
from nanoquant.output_folder import PARTIAL, check_output_folder
from nanoquant.packed_layers import packed_modules
from nanoquant.packed_linear import PackedBinaryLinear, frozen
from nanoquant.sources import check_dense

NUMBER = re.compile(r"(?:[A-Za-z_]+\.)+?(\d+)\.")
"""The first number in a name, which is that of a block."""
INDEX = "model.safetensors.index.json"
README = """# Signs as 32-bit words

The signs, scales and other tensors of a nanoquant checkpoint, in the layout that the llama.cpp port reads.
`nanoquant import FOLDER --output OUT --dense FOLDER` makes a checkpoint of them again. Nothing else reads them:
transformers finds no weights of the linears in these files and would make up random ones.
"""


def import_words(path: str | Path, output: str | Path, dense: str) -> dict[str, Any]:
    """Write a checkpoint with the signs, scales and other tensors of a state, all exactly as they are there.

    Args:
        path: ``.pt`` or ``.safetensors`` file, or folder of safetensors.
        output: new or empty folder.
        dense: folder or Hub name of the dense model, for configuration and tokenizer; its weights are not read.

    Returns:
        How many linears were read, and how many of the decoder's stay dense.

    Raises:
        ValueError: the state is none of the known kind, or not that of this model; the first wrong name is given.
    """
    output, folder = check_output_folder(output), resolve_folder(dense, weights=False)
    check_dense(folder)
    layers, rest = split_state(read_state(Path(path)))
    dtype = next((t.dtype for t in rest.values() if t.dtype in FLOATS), torch.bfloat16)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = skeleton_in(config, dtype)
    every = decoder_from_structure(model).linear_modules().keys()
    for name, signs in layers.items():
        model.set_submodule(name, _packed(model, name, signs))
    _fill(model, rest)
    mark_quantized(model)
    recipe = {"source": dense, "imported": Path(path).name}
    save_pretrained(model, output, folder, recipe=recipe)
    return {"quantized": len(layers), "dense": len(every - layers.keys())}


def _packed(model: PreTrainedModel, name: str, signs: Signs) -> PackedBinaryLinear:
    """The packed layer in the place of a linear of the same shape."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name} is in the state, but the model has no such part") from None
    known = isinstance(linear, (nn.Linear, Conv1D))
    if not known or linear_shape(linear) != signs.shape:
        shape = linear_shape(linear) if known else ""
        raise ValueError(
            f"{name} is {type(linear).__name__} {shape} in the model, but the state has factors of {signs.shape}"
        )
    if (signs.bias is None) != (linear.bias is None):
        has, lacks = ("model", "state") if signs.bias is None else ("state", "model")
        raise ValueError(f"{name} has a bias in the {has}, but none in the {lacks}")
    bias = None if signs.bias is None else frozen(signs.bias)
    packed = PackedBinaryLinear(
        *(len(signs.s2), len(signs.s1), len(signs.v_signs), bias is not None, "meta"),
        scale_dtype=signs.s1.dtype,
    )
    for part in ("u_signs", "v_signs", "s1", "s2"):
        setattr(packed, part, frozen(getattr(signs, part)))
    packed.bias = bias
    return packed


def _fill(model: PreTrainedModel, rest: dict[str, Tensor]) -> None:
    """Give the model all tensors that are not of quantized linears; tied ones may be left out."""
    known = set(model.state_dict())
    strange = [name for name in rest if name not in known]
    if strange:
        raise ValueError(f"{strange[0]} is in the state, but the model has no such tensor")
    for name, tensor in model.state_dict().items():
        found = rest.get(name, tensor)
        same_kind = (
            found.dtype in FLOATS if tensor.is_floating_point() else found.dtype == tensor.dtype
        )
        if found.shape != tensor.shape or not same_kind:
            raise ValueError(
                f"{name} is {found.dtype} {tuple(found.shape)} in the state and {tensor.dtype} {tuple(tensor.shape)} "
                "in the model"
            )
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise ValueError(f"{absent[0]} is not in the state, which has to hold the whole model")


def export_words(folder: str | Path, output: str | Path) -> list[Path]:
    """Write the words of a checkpoint as safetensors, a shard for each block, as the llama.cpp port reads them.

    Args:
        folder: checkpoint of binary factors, with an embedding of 16 bits.
        output: new or empty folder; it also gets configuration and tokenizer.

    Returns:
        The weight files.

    Raises:
        ValueError: the checkpoint holds what has no place there.
    """
    source, output = resolve_folder(folder), check_output_folder(output)
    model = load(source)
    other = [n for n, m in packed_modules(model).items() if not isinstance(m, PackedBinaryLinear)]
    tables = [
        n for n, m in model.named_modules() if isinstance(m, (QuantizedEmbedding, QuantizedHead))
    ]
    if other or tables:
        raise ValueError(
            f"{(other + tables)[0]} is neither dense nor made of signs, and words hold nothing else: quantize with "
            "--method binary and --embedding.bits 16"
        )
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=PARTIAL, dir=output) as partial:
        shards = _shards(model)
        for file, tensors in shards.items():
            save_file(tensors, Path(partial, file), metadata={"format": "pt"})
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        total = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
        write_json(
            str(Path(partial, INDEX)), {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        model.config.quantization_config = None
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        write_json(str(Path(partial, "config.json")), config)
        Path(partial, "README.md").write_text(
            README, encoding="utf-8"
        )  # not the card, which is of a checkpoint
        copy_other_files(source, Path(partial))
        move_in(Path(partial), output)
    return [output / file for file in shards]


def _shards(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Tensors by file: of every block, and of what is around the blocks."""
    packed, tied = packed_modules(model), set(model.all_tied_weights_keys)
    tensors = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name not in tied and name.rpartition(".")[0] not in packed
    }
    for name, layer in packed.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in words_of_layer(layer).items()}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = NUMBER.match(name)
        file = f"model-block-{int(found[1]):05}.safetensors" if found else "model-rest.safetensors"
        shards.setdefault(file, {})[name] = tensor.contiguous()
    return shards


def words_of_layer(layer: PackedBinaryLinear) -> dict[str, Tensor]:
    """The parts of one linear as :mod:`nanoquant.interchange.read` has them, scales of ranks all 1."""
    d_out, d_in, rank = layer.out_features, layer.in_features, layer.rank
    parts = {
        "U_packed": to_words(layer.u_signs, rank),
        "V_packed": to_words(layer.v_signs, d_in),
        "U_shape": torch.tensor([d_out, rank]),
        "V_shape": torch.tensor([rank, d_in]),
        "scale_pre": layer.s2.detach(),
        "scale_mid": torch.ones(rank, dtype=layer.s1.dtype),
        "scale_post": layer.s1.detach(),
    }
    return parts if layer.bias is None else parts | {"bias": layer.bias.detach()}
