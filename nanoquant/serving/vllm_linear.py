"""Packed linears inside vLLM's: those that it stacks, as q, k and v, keep a rank and input scales each.

vLLM makes one parameter for the parts of a stacked linear, of which ours differ in shape. So each kind of tensor is a
flat parameter with the parts one after the other, and its loader knows where each begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from nanoquant.checkpoint_files import QUANT_METHOD, check_format
from nanoquant.packed_linear import frozen
from nanoquant_kernels import binary_low_rank_linear, packed_width

LETTERS = {"q": 0, "k": 1, "v": 2}
"""Parts of a stacked attention as vLLM calls them; it numbers those of other linears."""
OTHERWISE = "serve it by nanoquant serve"


class NanoQuantVllmConfig(QuantizationConfig):
    """The ``quantization_config`` of a checkpoint, for vLLM.

    Args:
        modules: full name of each packed linear to {"rank": r}.
    """

    def __init__(self, modules: dict[str, dict[str, int]]) -> None:
        super().__init__()
        self.modules = modules

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NanoQuantVllmConfig:
        """Read what config.json says.

        Raises:
            ValueError: it is of another method or a newer version, or holds what has no layer here.
        """
        check_format(config, "the checkpoint")
        if config.get("tables"):
            raise ValueError(
                f"the checkpoint has {', '.join(config['tables'])} at 8 or 4 bits, which the plugin for vLLM has no "
                f"layer for: {OTHERWISE}, or quantize with --embedding.bits 16"
            )
        if any("rank" not in entry for entry in config["modules"].values()):
            raise ValueError(
                f"the checkpoint is of method product, which the plugin for vLLM has no layer for: {OTHERWISE}"
            )
        return cls(config["modules"])

    def get_name(self) -> str:
        """Name of the method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations that the operator takes."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ten times the compute capability that Triton asks for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files to read besides config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:  # noqa: ANN401
        """Rename the modules as vLLM's model renames its own."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What vLLM asks of each layer: a packed method, a dense one, or None, for one that is no linear.

        Raises:
            ValueError: the checkpoint has packed what this layer can't hold; names it.
        """
        if not isinstance(layer, LinearBase):
            held = [name for name in self.modules if f"{name}.".startswith(f"{prefix}.")]
            if held:
                raise ValueError(
                    f"{held[0]} is packed, but vLLM has a {type(layer).__name__} there, which the plugin has no layer "
                    f"for: {OTHERWISE}"
                )
            return None
        parts = self.parts(prefix)
        ranks = [self.modules[name]["rank"] for name in parts if name in self.modules]
        if not ranks:
            return UnquantizedLinearMethod()
        if len(ranks) < len(parts):
            raise ValueError(
                f"vLLM stacks {', '.join(parts)}, of which the checkpoint has packed some and left others dense: "
                f"{OTHERWISE}, or quantize all of them or none"
            )
        return PackedLinearMethod(prefix, ranks)

    def parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the linears that vLLM stacks in one."""
        parent, dot, last = prefix.rpartition(".")
        return [parent + dot + name for name in self.packed_modules_mapping.get(last, [last])]


class PackedLinearMethod(LinearMethodBase):
    """Tensors and product of one linear of vLLM, which is one or several of ours.

    Args:
        prefix: its name.
        ranks: of each of ours, in order.
    """

    def __init__(self, prefix: str, ranks: list[int]) -> None:
        self.prefix, self.ranks = prefix, ranks
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.loaded: set[tuple[str, int]] = set()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Give ``layer`` flat parameters for all parts; their loaders replace vLLM's.

        Raises:
            ValueError: the layer is divided over devices, or into other parts than the checkpoint's.
        """
        d_in, widths = input_size, output_partition_sizes
        if getattr(layer, "tp_size", 1) > 1 or (d_in, output_size) != (
            input_size_per_partition,
            sum(widths),
        ):
            raise ValueError(
                f"the plugin for vLLM has no tensor parallelism, and {self.prefix} is to be divided: "
                "serve with --tensor-parallel-size 1"
            )
        widths = widths if len(self.ranks) > 1 else [output_size]  # stored as one, stacked or not
        if len(widths) != len(self.ranks):
            raise ValueError(
                f"vLLM has {len(widths)} parts in {self.prefix}, the checkpoint {len(self.ranks)}: {OTHERWISE}"
            )
        self.shapes = {
            "u_signs": [(d, packed_width(r)) for d, r in zip(widths, self.ranks, strict=True)],
            "v_signs": [(r, packed_width(d_in)) for r in self.ranks],
            "s1": [(d,) for d in widths],
            "s2": [(d_in,) for _ in widths],
        }
        for name, shapes in self.shapes.items():
            dtype = torch.uint8 if name.endswith("signs") else torch.bfloat16
            flat = frozen(torch.zeros(sum(map(math.prod, shapes)), dtype=dtype))
            flat.weight_loader = self.loader(name)
            layer.register_parameter(name, flat)

    def loader(self, name: str) -> Any:  # noqa: ANN401
        """What vLLM calls with a stored tensor and the part that it is."""

        def load(param: nn.Parameter, stored: Tensor, part: int | str | None = None) -> None:
            part = LETTERS.get(part, part) if isinstance(part, str) else part
            part = 0 if part is None and len(self.ranks) == 1 else part
            if not isinstance(part, int) or not 0 <= part < len(self.ranks):
                raise ValueError(
                    f"{self.prefix}.{name} has {len(self.ranks)} parts, got part {part!r}"
                )
            shape = self.shapes[name][part]
            if tuple(stored.shape) != shape:
                raise ValueError(
                    f"{self.prefix}.{name}, part {part}, must have shape {shape}, got {tuple(stored.shape)}; "
                    "the checkpoint is damaged or of another model"
                )
            if stored.dtype != param.dtype:  # scales keep what they were stored in
                if not (stored.is_floating_point() and param.is_floating_point()):
                    raise ValueError(
                        f"{self.prefix}.{name} must be {param.dtype}, got {stored.dtype}"
                    )
                param.data = param.data.to(torch.promote_types(param.dtype, stored.dtype))
            self.views(name, param)[part].copy_(stored)
            self.loaded.add((name, part))

        return load

    def views(self, name: str, flat: Tensor) -> list[Tensor]:
        """The tensors of each part in their shapes, in the storage of the flat one."""
        shapes = self.shapes[name]
        pieces = flat.detach().split([math.prod(shape) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise ValueError where the checkpoint lacked a tensor."""
        wanted = {(name, part) for name in self.shapes for part in range(len(self.ranks))}
        if lacking := sorted(wanted - self.loaded):
            name, part = lacking[0]
            raise ValueError(
                f"the checkpoint lacks {len(lacking)} tensors of {self.prefix}: {name} of part {part} is one of them"
            )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply each part to ``x`` (..., d_in), giving (..., sum of d_out)."""
        tensors: Mapping[str, list[Tensor]] = {
            name: self.views(name, getattr(layer, name)) for name in self.shapes
        }
        widths = [s1.shape[0] for s1 in tensors["s1"]]
        biases = [None] * len(widths) if bias is None else bias.split(widths)
        parts = zip(*tensors.values(), biases, self.ranks, strict=True)
        outputs = [binary_low_rank_linear(x, *operands) for operands in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
