"""Hugging Face checkpoints: packing a model, saving it as a folder, loading it, and its sizes.

The folder is plain: safetensors with the tensors of every packed layer, and
``config.json`` whose ``quantization_config`` lists the quantized modules.
"""

from __future__ import annotations

import dataclasses
import logging
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.checkpoint_files import (
    QUANT_METHOD,
    StoredTensor,
    copy_other_files,
    damage_named,
    verify_folder,
)
from nanoquant.commit import commit, sync, sync_tree
from nanoquant.hf_quantizer import (
    NanoQuantHfConfig,
    NanoQuantHfQuantizer,
    check_dtypes,
    check_tensors,
    swap_modules,
)
from nanoquant.methods import Layer
from nanoquant.model_embeddings import swap_embeddings
from nanoquant.model_folder import resolve_folder
from nanoquant.output_folder import PARTIAL, check_output_folder
from nanoquant.packed_layers import (
    from_packed_weight,
    is_packed,
    pack_layer,
    packed_entry,
    packed_modules,
    parts_of,
)
from nanoquant.sizes import Sizes, measure_sizes

logger = logging.getLogger(__name__)

LARGEST_SHARD = "1GB"
"""Largest shard of a checkpoint by default."""


def pack_model(model: nn.Module, scale_dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replace every latent or frozen layer by a packed one, in place.

    Args:
        model: holds layers of either method that train, or linears whose weight is a ``PackedBinaryTensor`` or a
            ``PackedProductTensor``. The model itself must not be such a layer.
        scale_dtype: dtype of the stored scales and codebooks; packed weights keep theirs.

    Returns:
        The same model. If it is a transformers model, its own ``save_pretrained`` now writes a
        checkpoint too.

    Raises:
        ValueError: a value is not finite; the layer is named.
    """
    for name, layer in list(model.named_modules()):
        if not (isinstance(layer, Layer) or is_packed_weight(layer)):
            continue
        bias = layer.bias
        if bias is not None:
            bias = bias.detach().to(getattr(model, "dtype", bias.dtype))
        try:
            if isinstance(layer, Layer):
                packed = pack_layer(layer, bias, scale_dtype)
            else:
                packed = from_packed_weight(layer.weight, bias)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        model.set_submodule(name, packed.train(layer.training))
    if isinstance(model, PreTrainedModel) and packed_modules(model):
        mark_quantized(model)
    return model


def is_packed_weight(module: nn.Module) -> bool:
    """Whether this is a linear whose weight is a packed tensor."""
    return isinstance(module, nn.Linear) and is_packed(module.weight)


def mark_quantized(model: PreTrainedModel, recipe: dict[str, Any] | None = None) -> None:
    """Tell transformers that the model is quantized; untie packed heads from dense embeddings.

    A head that was tied and no longer is gets a warning: the checkpoint then stores both matrices.
    """
    config = NanoQuantHfConfig(recipe=recipe)
    model.config.quantization_config = config
    model.hf_quantizer = NanoQuantHfQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    packed = {f"{name}.weight" for name in packed_modules(model)}
    for pair in list(model.all_tied_weights_keys.items()):
        if packed & set(pair):
            del model.all_tied_weights_keys[pair[0]]
            model.config.tie_word_embeddings = False
            logger.warning(
                "%s and %s are no longer tied, because only one of them is packed; the model stores "
                "both now. Keep the head dense to keep it tied",
                *pair,
            )


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError unless the model is packed, finite, and of the dtype a reload gives it."""
    for name, module in model.named_modules():
        if isinstance(module, Layer) or is_packed_weight(module):
            raise ValueError(f"{name} is not packed yet; call pack_model(model) before saving")
    if not packed_modules(model):
        raise ValueError("no layer of the model is quantized; quantize and pack it before saving")
    adapted = [name for name in packed_modules(model) if name.endswith(".base_layer")]
    if adapted:
        raise ValueError(
            f"{adapted[0].removesuffix('.base_layer')} carries an adapter, which a checkpoint has no place for; save "
            "it with nanoquant.adapters.save_adapter, then model.unload() gives the packed model"
        )
    numbers = {
        f"{name}.{part}"
        for name, layer in packed_modules(model).items()
        for part in parts_of(packed_entry(layer))[1]
    }
    keep = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if hasattr(parameter, "tensor_data_names"):
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__} of torchao, but checkpoints hold packed and dense "
                "tensors alone; leave it dense, or keep the mixture with torch.save(model.state_dict(), file)"
            )
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ValueError(f"{name} holds a value that is not finite; nothing was written")
        free = name in numbers or any(part in name for part in keep)
        if parameter.dtype != model.dtype and not free:
            raise ValueError(
                f"{name} is {parameter.dtype} but the model is {model.dtype}; a loaded model has "
                "one dtype, so cast it first"
            )


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    source: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = LARGEST_SHARD,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write a packed model as a Hugging Face folder that needs nothing else to be loaded.

    Args:
        model: a packed model, see :func:`pack_model`.
        folder: new or empty folder. Files appear there when all are written, ``config.json`` last.
        source: folder or Hub name of the dense model, whose files other than weights are copied.
        tokenizer: saved as well; its files take precedence over the source's.
        max_shard_size: largest shard, in bytes or as "5GB"; of a model on a GPU one at a time is copied to the CPU.
        recipe: how the model was made, any JSON object; kept in ``config.json``. None keeps what is
            there.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty, the model is not packed, a value is not finite (named),
            a tensor is of another dtype than the model, or the source can't be found.
        OSError: the disk refuses it; nothing is left there, so that the same call can be made again.
    """
    folder = check_output_folder(folder)
    check_model(model)
    source_folder = None if source is None else resolve_folder(source, weights=False)
    if recipe is None:
        recipe = getattr(getattr(model.config, "quantization_config", None), "recipe", None)
    mark_quantized(model, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=PARTIAL, dir=folder) as partial:
            model.save_pretrained(
                partial, max_shard_size=max_shard_size, save_original_format=False
            )
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if source_folder is not None:
                copy_other_files(source_folder, Path(partial))
            move_in(Path(partial), folder)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"the checkpoint {folder} can't be written ({error}); make room and save again, or give the same quantize "
            "command, which goes on with what it has kept"
        ) from error
    logger.info("wrote %s", folder)
    return folder


def move_in(partial: Path, folder: Path) -> None:
    """Give files their place once the disk has them, ``config.json`` when it has all others there; all or none."""
    sync_tree(partial)
    *others, last = sorted((file.name for file in partial.iterdir()), key="config.json".__eq__)
    try:
        for name in others:
            (partial / name).rename(folder / name)
        sync(folder)
        commit(partial / last, folder / last)
        sync(folder.parent)
    except BaseException:
        for name in (last, *others):
            with suppress(OSError):  # it never came there
                (folder / name).rename(partial / name)
        raise


def load(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a checkpoint: no dense weight is ever in memory, no code or pickle of the folder is run.

    Args:
        folder: a folder, or "owner/name" on the Hugging Face Hub.
        dtype: dtype of what is not quantized; None means as stored. Scales always keep their stored
            dtype.
        device_map: where to put the model, as in transformers, which wants ``accelerate`` for it; None means the CPU.

    Raises:
        ValueError: the folder is not a complete nanoquant checkpoint of a known format; the message
            says why.
    """
    folder = resolve_folder(folder)
    stored = verify_folder(folder)
    with damage_named(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if dtype is None:
        check_dtypes(model, stored)
    return model


def packed_skeleton(folder: Path, stored: dict[str, StoredTensor]) -> PreTrainedModel:
    """The model of a checkpoint folder on the meta device, its linears packed, as ``stored`` has them.

    Raises:
        ValueError: what is stored is not what ``config.json`` says.
    """
    with damage_named(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        swap_modules(skeleton, config.quantization_config["modules"], stored)
        swap_embeddings(skeleton, config.quantization_config.get("tables", {}))
        check_tensors(skeleton, stored)
    return skeleton


def read_sizes(model: nn.Module | str | Path) -> Sizes:
    """Sizes of a model, or of a checkpoint folder without loading its weights.

    Raises:
        ValueError: the folder is not a complete nanoquant checkpoint.
    """
    if isinstance(model, nn.Module):
        return measure_sizes(model)
    folder = resolve_folder(model)
    stored = verify_folder(folder)
    sizes = measure_sizes(packed_skeleton(folder, stored))
    stored_bytes = sum(
        tensor.bytes for tensor in stored.values()
    )  # the file has the last word on dtypes
    return dataclasses.replace(
        sizes,
        model_bits_per_parameter=8 * stored_bytes / sizes.parameters,
        bytes_on_disk=stored_bytes,
        bytes_resident=sizes.bytes_resident - sizes.bytes_on_disk + stored_bytes,
    )
