"""The plugin for vLLM against its interfaces: a checkpoint's tensors go through its loaders and give our outputs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import vllm_interfaces
from packed_models import random_factors
from safetensors.torch import load_file
from tiny_models import tiny_llama
from torch import nn
from vllm_interfaces import STACKED, LinearBase, load

import nanoquant
from nanoquant.methods import layer_of
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.serving import vllm_plugin  # with no vllm here: importing it must not need one

RANKS = {"q_proj": 24, "k_proj": 9, "v_proj": 17, "o_proj": 33, "gate_proj": 5, "up_proj": 40}
RANKS["down_proj"] = 21


@pytest.fixture
def registered(monkeypatch):
    """What a vLLM of the version that was read has registered after loading its plugins."""
    found = vllm_interfaces.install(monkeypatch)
    monkeypatch.setattr(vllm_plugin, "version", lambda name: "0.33.0")
    monkeypatch.delitem(sys.modules, "nanoquant.serving.vllm_linear", raising=False)
    vllm_plugin.register()
    yield found
    sys.modules.pop("nanoquant.serving.vllm_linear", None)  # it holds on to the stand-ins


def packed_llama(scale_dtype):
    """A packed model whose linears all have another rank, with biases where attention has them."""
    model = tiny_llama(tie=False, attention_bias=True)
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last in RANKS:
            size = module.out_features, module.in_features, RANKS[last]
            bias = None if module.bias is None else torch.randn_like(module.bias)
            model.set_submodule(name, layer_of(random_factors(*size, seed=len(name)), bias))
    return nanoquant.pack_model(model, scale_dtype)


def vllm_layers(config, model):
    """vLLM's linears of a Llama by prefix."""
    layers = {}
    for name, ours in model.named_modules():
        parent, _, last = name.rpartition(".")
        stack = next((new for new, parts in STACKED.items() if last in parts), last)
        prefix = f"{parent}.{stack}"
        if isinstance(ours, PackedBinaryLinear) and prefix not in layers:
            parts = [model.get_submodule(f"{parent}.{n}") for n in STACKED.get(stack, [last])]
            sizes = [part.out_features for part in parts]
            layers[prefix] = LinearBase(
                ours.in_features, sizes, ours.bias is not None, config, prefix
            )
    return layers


def configured(registered, settings):
    config = registered["nanoquant"].from_config(settings)
    config.packed_modules_mapping.update(STACKED)  # as vLLM's model does
    return config


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_a_checkpoint_loads_part_by_part_and_gives_the_outputs_of_our_layers(
    registered, tmp_path, scale_dtype
):
    model = packed_llama(scale_dtype)
    nanoquant.save_pretrained(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    layers = vllm_layers(configured(registered, settings), model)
    others = load(layers, load_file(tmp_path / "out/model.safetensors"))
    assert others and not any(name.endswith(("signs", "s1", "s2")) for name in others)
    assert len(layers) == 4 * model.config.num_hidden_layers
    for prefix, layer in layers.items():
        parent, _, last = prefix.rpartition(".")
        parts = [model.get_submodule(f"{parent}.{name}") for name in STACKED.get(last, [last])]
        x = torch.randn(3, parts[0].in_features)
        assert torch.equal(layer(x), torch.cat([part(x) for part in parts], -1))
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        held = sum(t.numel() for name, t in layer.named_parameters() if name != "bias")
        assert held == sum(
            t.numel() for part in parts for t in (part.u_signs, part.v_signs, part.s1, part.s2)
        )


def test_a_linear_that_is_stored_as_one_is_one_though_vllm_divides_it(registered):
    config = configured(registered, settings_of({"l.qkv_proj": {"rank": 8}}))
    config.packed_modules_mapping.clear()
    layer = LinearBase(16, [16, 8, 8], quant_config=config, prefix="l.qkv_proj")
    ours = PackedBinaryLinear.from_factors(random_factors(32, 16, 8))
    stored = {f"l.qkv_proj.{name}": tensor for name, tensor in ours.state_dict().items()}
    assert load({"l.qkv_proj": layer}, stored) == []
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), ours(x))


def settings_of(modules, **others):
    return {
        "quant_method": "nanoquant",
        "format_version": 1,
        "modules": modules,
        "recipe": {},
    } | others


def test_what_is_not_packed_stays_dense_and_other_layers_are_left_to_vllm(registered):
    config = configured(registered, settings_of({"l.o_proj": {"rank": 8}}))
    layer = LinearBase(16, [16], quant_config=config, prefix="l.o_proj")
    method = config.get_quant_method(layer, "l.down_proj")
    assert isinstance(method, vllm_interfaces.UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Embedding(2, 2), "lm_head") is None


def test_what_the_plugin_cannot_serve_is_refused_by_name(registered):
    read = registered["nanoquant"].from_config
    with pytest.raises(ValueError, match="quant_method 'awq'"):
        read({"quant_method": "awq"})
    with pytest.raises(ValueError, match="model.embed_tokens at 8 or 4 bits.*--embedding.bits 16"):
        read(settings_of({}, format_version=2, tables={"model.embed_tokens": {"bits": 8}}))
    look_ups = {"group": 4, "widths": [8], "slabs": 1}
    with pytest.raises(ValueError, match="method product"):
        read(settings_of({"l.o_proj": look_ups}, format_version=3))
    config = configured(registered, settings_of({"l.q_proj": {"rank": 8}, "lm_head": {"rank": 8}}))
    with pytest.raises(ValueError, match="some and left others dense"):
        LinearBase(16, [16, 8, 8], quant_config=config, prefix="l.qkv_proj")
    with pytest.raises(ValueError, match="lm_head is packed, but vLLM has a Embedding"):
        config.get_quant_method(nn.Embedding(2, 2), "lm_head")
    experts = configured(registered, settings_of({"l.experts.0.up_proj": {"rank": 8}}))
    with pytest.raises(ValueError, match="l.experts.0.up_proj is packed"):
        experts.get_quant_method(nn.Module(), "l.experts")
    config = configured(registered, settings_of({"l.o_proj": {"rank": 8}}))
    with pytest.raises(ValueError, match="no tensor parallelism.*--tensor-parallel-size 1"):
        LinearBase(16, [16], quant_config=config, prefix="l.o_proj", tp_size=2)


def test_tensors_that_are_missing_or_of_another_shape_or_part_are_named(registered):
    modules = {"l.gate_proj": {"rank": 8}, "l.up_proj": {"rank": 16}}
    config = configured(registered, settings_of(modules))
    layer = LinearBase(16, [24, 24], quant_config=config, prefix="l.gate_up_proj")
    signs = layer.u_signs
    with pytest.raises(ValueError, match=r"part 1, must have shape \(24, 2\), got \(24, 1\)"):
        signs.weight_loader(signs, torch.zeros(24, 1, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="has 2 parts, got part None"):
        signs.weight_loader(signs, torch.zeros(24, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got part 2"):
        signs.weight_loader(signs, torch.zeros(24, 1, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="must be torch.uint8, got torch.float32"):
        signs.weight_loader(signs, torch.zeros(24, 1), 0)
    with pytest.raises(ValueError, match="lacks 8 tensors of l.gate_up_proj: s1 of part 0"):
        load({"l.gate_up_proj": layer}, {})


@pytest.mark.parametrize("found", ["0.32.1", "0.34.0", "1.0", "0.3.30"])
def test_another_version_of_vllm_is_named_and_left_alone(found, monkeypatch, caplog):
    registered = vllm_interfaces.install(monkeypatch)
    monkeypatch.setattr(vllm_plugin, "version", lambda name: found)
    vllm_plugin.register()
    assert registered == {} and f"but this is {found}" in caplog.text
    assert "pip install 'nanoquant[vllm]'" in caplog.text


def test_the_entry_point_and_the_extra_are_those_of_the_plugin():
    settings = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    entry = settings.split('[project.entry-points."vllm.general_plugins"]')[1].split("\n\n")[0]
    module, _, function = entry.split('"')[1].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert f'vllm = ["vllm=={vllm_plugin.READ}*"]' in settings
