"""The interfaces of vLLM 0.33.0 that the plugin uses, with the signatures of its sources, and nothing behind them.

``LinearBase`` and its stacked kind call the method as vLLM's do; what is loaded goes through ``weight_loader`` of the
parameter, with the part that vLLM's mapper of Llama names.
"""

import sys
from types import ModuleType

import torch
from torch import nn

STACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PARTS = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


class QuantizeMethodBase:
    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class QuantizationConfig:
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = dict()


class LinearBase(nn.Module):
    """A linear of parts ``output_sizes``; with ``tp_size`` the share of one device, by columns."""

    def __init__(
        self, input_size, output_sizes, bias=False, quant_config=None, prefix="", tp_size=1
    ):
        super().__init__()
        self.prefix, self.tp_size, self.output_sizes = prefix, tp_size, output_sizes
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=[size // tp_size for size in output_sizes],
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=torch.get_default_dtype(),
            weight_loader=self.weight_loader,
        )
        size = sum(output_sizes)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None
        if bias:
            self.bias.weight_loader = self.weight_loader

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        """What vLLM's own parameters are loaded by: rows of the part."""
        part = {"q": 0, "k": 1, "v": 2}.get(loaded_shard_id, loaded_shard_id) or 0
        start = sum(self.output_sizes[:part])
        param.data[start : start + self.output_sizes[part]].copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


def load(layers, tensors):
    """Load stored tensors by name into layers by prefix, as vLLM's AutoWeightsLoader and mapper of Llama do.

    Returns:
        Names that no layer has.
    """
    others = []
    for name, tensor in tensors.items():
        part = None
        for old, (new, number) in PARTS.items():
            if old in name:
                name, part = name.replace(old, new, 1), number
        prefix, _, last = name.rpartition(".")
        if prefix not in layers:
            others.append(name)
            continue
        param = dict(layers[prefix].named_parameters(recurse=False))[last]
        param.weight_loader(param, tensor, *([] if part is None else [part]))
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    return others


def install(monkeypatch):
    """Make these importable as vllm; returns where its methods are registered."""
    registered = {}

    def register_quantization_config(quantization):
        def wrapper(kind):
            assert issubclass(kind, QuantizationConfig)
            registered[quantization] = kind
            return kind

        return wrapper

    layers = "vllm.model_executor.layers"
    names = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {"register_quantization_config": register_quantization_config},
        f"{layers}.quantization.base_config": {
            "QuantizationConfig": QuantizationConfig,
            "QuantizeMethodBase": QuantizeMethodBase,
        },
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return registered
