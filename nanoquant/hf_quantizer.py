"""The quantizer by which transformers loads and saves packed models; registered at import.

Between building the model on the meta device and reading weights it swaps the listed linears for
packed ones, so no dense weight ever exists, and it compares every stored tensor with the model
before one is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nanoquant.checkpoint_files import (
    CHECKPOINT_KEY,
    QUANT_METHOD,
    StoredTensor,
    check_format,
    lowest_version,
    read_headers,
    verify_folder,
)
from nanoquant.mapped import DTYPES
from nanoquant.methods import size_of
from nanoquant.model_embeddings import (
    dense_embeddings,
    quantized_tables,
    swap_embeddings,
    table_entries,
)
from nanoquant.non_finite import non_finite
from nanoquant.packed_layers import empty_layer, packed_entry, packed_modules, parts_of
from nanoquant.sizes import packed_parts

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@register_quantization_config(QUANT_METHOD)
class NanoQuantHfConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of ``config.json``.

    Args:
        modules: full module name to {"rank": r}, or to group, widths and slabs of codebooks, for every
            quantized linear.
        format_version: version of the stored layout, None for the lowest that the content needs; one
            that is newer than this library's is refused.
        recipe: how the model was made, any JSON object; nothing reads it.
        checkpoint_id: digest of the tensors at saving, repeated in every shard. It ties shards
            together so that they are not mixed up; it does not verify content when loading.
        quant_method: always "nanoquant".
        tables: full name of a quantized embedding or head to its bits and, at 4 bits, group size; not
            written where there is none.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int | None = None,
        recipe: dict[str, Any] | None = None,
        checkpoint_id: str | None = None,
        quant_method: str = QUANT_METHOD,
        tables: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.quant_method = quant_method
        self.modules = {} if modules is None else modules
        lowest = lowest_version(tables, self.modules)
        self.format_version = lowest if format_version is None else format_version
        self.recipe = {} if recipe is None else recipe
        self.checkpoint_id = checkpoint_id
        if tables:
            self.tables = tables
        check_format(self.__dict__, "the checkpoint")

    def set_tables(self, tables: dict[str, dict[str, int]]) -> None:
        """Record the quantized embedding and head; without any the configuration has no such entry."""
        self.__dict__.pop("tables", None)
        if tables:
            self.tables = tables
        self.format_version = lowest_version(tables, self.modules)


@register_quantizer(QUANT_METHOD)
class NanoQuantHfQuantizer(HfQuantizer):
    """Puts packed modules in place before transformers reads weights, so none is ever dense."""

    requires_calibration = True
    quantization_config: NanoQuantHfConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> None:
        """Check the files, swap the listed modules, check every stored tensor against the model."""
        stored = self._read_files(model, [Path(file) for file in checkpoint_files or []])
        swap_modules(model, self.quantization_config.modules, stored)
        swap_embeddings(model, getattr(self.quantization_config, "tables", {}))
        check_tensors(model, stored)

    def _read_files(self, model: PreTrainedModel, files: list[Path]) -> dict[str, StoredTensor]:
        """Headers of the files that transformers is about to read."""
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise ValueError(
                f"a nanoquant checkpoint loads from safetensors files only, got {files or 'none'}"
            )
        folder = Path(model.config.name_or_path)
        if not (folder / "config.json").is_file():
            return read_headers(files, self.quantization_config.checkpoint_id)
        stored = verify_folder(folder)
        outside = {f.resolve() for f in files} - {t.file.resolve() for t in stored.values()}
        if outside:
            raise ValueError(
                f"transformers would read files that are not this checkpoint's: {sorted(outside)}"
            )
        return stored

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: object
    ) -> PreTrainedModel:
        """Freeze the packed tensors and make sure that nothing was left without a value."""
        for module in packed_modules(model).values():
            module.requires_grad_(False)
        for table in quantized_tables(model).values():
            table.scales.requires_grad_(False)
        offloaded = len(set(getattr(model, "hf_device_map", {}).values())) > 1
        tensors = [*model.named_parameters(), *model.named_buffers()]
        empty = [name for name, tensor in tensors if tensor.is_meta]
        if empty and not offloaded:
            raise ValueError(f"these tensors got no value from the checkpoint: {shorten(empty)}")
        check_finite(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Bring the configuration up to date; ``save_pretrained`` calls this first."""
        config = self.quantization_config
        config.modules = {
            name: packed_entry(layer) for name, layer in packed_modules(model).items()
        }
        config.set_tables(table_entries(model))
        config.checkpoint_id = digest(model)
        return None, {CHECKPOINT_KEY: config.checkpoint_id}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Put dense linears in place of the packed ones, for ``model.dequantize()``."""
        for name, packed in packed_modules(model).items():
            bias = packed.bias
            linear = nn.Linear(packed.in_features, packed.out_features, bias is not None, "meta")
            linear.weight = nn.Parameter(packed.dequantize().to(dtype), requires_grad=False)
            linear.bias = bias
            model.set_submodule(name, linear.train(packed.training))
        dense_embeddings(model, dtype)
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train beside the packed layers, with gradients through their operators."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operator has a fake kernel."""
        return True


def shorten(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def swap_modules(
    model: nn.Module, modules: dict[str, dict[str, Any]], stored: dict[str, StoredTensor]
) -> None:
    """Replace the listed linears by packed ones on the meta device, numbers in the stored dtype."""
    present = dict(model.named_modules())
    for name, entry in modules.items():
        dense = present.get(name)
        if isinstance(dense, nn.Linear):
            d_in, d_out = dense.in_features, dense.out_features
        elif isinstance(dense, Conv1D):
            d_in, d_out = dense.weight.shape
        else:
            found = "nothing" if dense is None else type(dense).__name__
            raise ValueError(
                f"the checkpoint lists {name} as a quantized linear, but the model has {found}"
            )
        dtype = _stored_dtype(name, entry, stored)
        bias_dtype = None if dense.bias is None else dense.bias.dtype
        try:
            packed = empty_layer(d_out, d_in, size_of(entry), dtype, bias_dtype)
        except ValueError as error:
            raise ValueError(f"the checkpoint lists {name} with {entry}: {error}") from None
        packed._is_hf_initialized = True  # transformers would look for a weight to initialize
        parent = model.get_submodule(name.rpartition(".")[0])
        if not any(True for _ in (*parent.parameters(False), *parent.buffers(False))):
            parent._is_hf_initialized = True  # GPT-2 initializes the weights of children
        model.set_submodule(name, packed.train(dense.training))


def _stored_dtype(name: str, entry: dict[str, Any], stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype of a quantized linear's numbers, all of whose tensors must be there."""
    codes, numbers = parts_of(entry)
    missing = [f"{name}.{part}" for part in codes + numbers if f"{name}.{part}" not in stored]
    if missing:
        others = [f"{name}.{part}" for part in ("indices", "u_signs") if part not in codes]
        mixed = [other for other in others if other in stored]
        hint = f" and has {mixed[0]}: it was made by another method" if mixed else ""
        raise ValueError(
            f"the checkpoint lists {name} as quantized, but lacks {shorten(missing)}{hint}"
        )
    dtypes = [stored[f"{name}.{number}"].dtype for number in numbers]
    if dtypes[0] not in FLOATS or len(set(dtypes)) > 1:
        raise ValueError(
            f"scales of {name}, as {' and '.join(numbers)}, are {dtypes}; all must be the same one of {list(FLOATS)}"
        )
    return FLOATS[dtypes[0]]


def check_tensors(model: PreTrainedModel, stored: dict[str, StoredTensor]) -> None:
    """Raise ValueError naming tensors that are missing, foreign, or of a wrong shape or kind."""
    expected = model.state_dict()
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    unsaved = tied | set(model._keys_to_ignore_on_save or ())
    missing = sorted(expected.keys() - stored.keys() - unsaved)
    missing += sorted(
        name
        for pair in model.all_tied_weights_keys.items()
        if not stored.keys() & set(pair)
        for name in pair
    )
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of the model: {shorten(missing)}"
        )
    foreign = sorted(stored.keys() - expected.keys())
    if foreign:
        raise ValueError(
            f"{stored[foreign[0]].file} holds tensors that the model does not have "
            f"({len(foreign)} in all): {shorten(foreign)}; is it a shard of another model?"
        )
    for name, tensor in stored.items():
        want = expected[name]
        exact = [kind for kind, dtype in DTYPES.items() if dtype == want.dtype]
        kinds = list(FLOATS) if want.is_floating_point() else exact
        if tensor.shape != tuple(want.shape) or tensor.dtype not in kinds:
            raise ValueError(
                f"{name} in {tensor.file} is {tensor.dtype} of shape {tensor.shape}, but the model "
                f"asks for {' or '.join(kinds)} of shape {tuple(want.shape)}"
            )


def check_dtypes(model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise ValueError unless the floating point tensors of a model are of the dtypes that they are stored in."""
    for name, parameter in model.named_parameters():
        want = FLOATS.get(stored[name].dtype) if name in stored else None
        if want not in (None, parameter.dtype):
            raise ValueError(
                f"{name} in {stored[name].file} is {stored[name].dtype}, but config.json makes {parameter.dtype} "
                "of it; give the dtype that you want"
            )


def check_finite(model: nn.Module) -> None:
    """Raise ValueError naming a parameter that holds a value that is not finite."""
    broken = non_finite(model.named_parameters())
    if broken:
        raise ValueError(
            f"{shorten(broken)} holds a value that is not finite: the checkpoint is damaged, or "
            f"{model.get_parameter(broken[0]).dtype} too narrow for what it stores"
        )


def digest(model: nn.Module) -> str:
    """Hash of names, shapes, dtypes and bytes of all parameters; equal for equal models."""
    state = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        for part in packed_parts(parameter.detach()):
            state.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
            if not part.is_meta:
                state.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
