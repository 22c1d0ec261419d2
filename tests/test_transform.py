"""torchao's quantize_ takes a NanoQuantConfig: without data, and in two steps with data."""

import copy
import dataclasses
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from tiny_models import random_windows, tiny_gpt2, tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig, quantize_
from transformers.pytorch_utils import Conv1D

import nanoquant
from nanoquant.admm import ADMMConfig
from nanoquant.architectures import find_decoder
from nanoquant.binary import relative_error
from nanoquant.budget import BudgetConfig
from nanoquant.calibration import collect_importances
from nanoquant.config import NanoQuantConfig, nanoquant_config
from nanoquant.importance import ImportanceConfig
from nanoquant.packed_tensor import PackedBinaryTensor
from nanoquant.product_packed import PackedProductLinear
from nanoquant.product_tensor import PackedProductTensor
from nanoquant.training import RunConfig
from nanoquant.transform import ObservedLinear

CONFIG = NanoQuantConfig(
    budget=BudgetConfig(bits=1.5, rank_multiple=8), admm=ADMMConfig(iterations=20)
)
PREPARE, CONVERT = (dataclasses.replace(CONFIG, step=step) for step in ("prepare", "convert"))
WINDOWS = random_windows(4, 16)


def two_layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48, bias=False))


def skewed_batch():
    """Inputs whose first channels are loud and outputs whose last ones matter."""
    torch.manual_seed(1)
    return torch.randn(256, 64) * torch.linspace(3, 0.1, 64), torch.linspace(0, 3, 48)


def observe(model):
    x, weight = skewed_batch()
    (model(x).square() * weight).sum().backward()


def only_decoder(module, name):
    return isinstance(module, nn.Linear | Conv1D) and "head" not in name


def test_without_data_every_linear_becomes_packed_and_keeps_its_bias():
    model, x = two_layers(), torch.randn(5, 64)
    bias = model[0].bias
    quantize_(model, CONFIG)
    for layer in (model[0], model[2]):
        assert type(layer) is nn.Linear and isinstance(layer.weight, PackedBinaryTensor)
        assert not layer.weight.requires_grad and layer.weight.dtype == torch.float32
        assert layer.weight.bits <= 1.5 * layer.weight.numel()
    assert model[0].bias is bias and model[2].bias is None
    expected = model[2].weight.dequantize() @ model[1](
        model[0].weight.dequantize() @ x.T + bias[:, None]
    )
    torch.testing.assert_close(model(x), expected.T, rtol=5e-2, atol=2e-2)


def test_without_data_every_linear_is_looked_up_where_the_method_says_so_and_can_be_saved():
    model, x = nn.Sequential(two_layers()), torch.randn(5, 64)
    quantize_(model, nanoquant_config(2.0, method="product"))
    for layer in (model[0][0], model[0][2]):
        assert isinstance(layer.weight, PackedProductTensor)
        assert layer.weight.bits <= 2.0 * layer.weight.numel()
    before = model(x)
    quantize_(model, nanoquant_config(2.0, method="product"))  # packed linears stay as they are
    assert torch.equal(model(x), before)
    nanoquant.pack_model(model)
    assert isinstance(model[0][0], PackedProductLinear)
    assert torch.equal(model(x), before)


def test_without_data_the_weight_is_close_to_the_dense_one():
    model = two_layers()
    weight = model[0].weight.detach().clone()
    quantize_(model, CONFIG)
    assert relative_error(weight, model[0].weight.dequantize()) < 0.5


@pytest.mark.parametrize("bits", [1.5, 2.5])
def test_rank_is_the_largest_multiple_within_each_layers_own_budget(bits):
    model = two_layers()
    budget = dataclasses.replace(CONFIG.budget, bits=bits)
    quantize_(model, dataclasses.replace(CONFIG, budget=budget))
    for layer in (model[0], model[2]):
        d_out, d_in = layer.weight.shape
        used = [
            (r + 16) * (d_out + d_in) / (d_out * d_in)
            for r in (layer.weight.rank, layer.weight.rank + 8)
        ]
        assert used[0] <= bits < used[1]
    assert any(layer.weight.rank > min(layer.weight.shape) for layer in model[::2]) == (bits > 2)


def test_a_config_from_nanoquant_config_works():
    model = nn.Sequential(nn.Linear(128, 128))
    quantize_(model, nanoquant.nanoquant_config(bits=1.0, admm=ADMMConfig(iterations=2)))
    assert model[0].weight.rank == 32


def test_the_handler_is_there_as_soon_as_the_config_module_is():
    code = """
from nanoquant.calibration import collect_importances
from nanoquant.config import nanoquant_config
from torch import nn
from torchao.quantization import quantize_
model = nn.Sequential(nn.Linear(128, 128))
quantize_(model, nanoquant_config(bits=1.0))
assert model[0].weight.rank == 32
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_second_call_leaves_packed_weights_alone():
    model = two_layers()
    quantize_(model, CONFIG)
    weights = [model[0].weight, model[2].weight]
    for config in (CONFIG, PREPARE, CONVERT):
        quantize_(model, config)
    assert model[0].weight is weights[0] and model[2].weight is weights[1]


def test_a_filter_and_a_table_of_names_choose_linears_and_bits():
    model = two_layers()
    quantize_(model, CONFIG, filter_fn=lambda module, name: name == "2")
    assert isinstance(model[2].weight, PackedBinaryTensor) and type(model[0].weight) is nn.Parameter
    model = two_layers()
    more = dataclasses.replace(CONFIG, budget=BudgetConfig(bits=2.0, rank_multiple=8))
    quantize_(model, FqnToConfig(OrderedDict([("0", CONFIG), ("2", more)])), filter_fn=None)
    assert model[0].weight.bits <= 1.5 * 64 * 96 < model[2].weight.bits * 2 <= 4 * 96 * 48


def test_a_single_linear_is_quantized_in_place():
    model = nn.Linear(64, 96)
    quantize_(model, CONFIG)
    assert isinstance(model.weight, PackedBinaryTensor)


def test_conv1d_chosen_by_a_filter_becomes_a_packed_linear():
    model = tiny_gpt2()
    quantize_(model, CONFIG, filter_fn=only_decoder)
    assert isinstance(model.transformer.h[0].attn.c_attn, nn.Linear)
    with torch.no_grad():
        assert model(input_ids=WINDOWS).logits.isfinite().all()


@pytest.mark.parametrize("curvature", ["diagonal", "inputs", "both"])
@pytest.mark.parametrize("convert_as", ["given", "copied"])
def test_two_steps_use_the_importances_of_the_collector(convert_as, curvature):
    importance = ImportanceConfig(curvature=curvature)
    prepare, convert = (dataclasses.replace(c, importance=importance) for c in (PREPARE, CONVERT))
    model = tiny_llama()
    expected = collect_importances(model, find_decoder(model), WINDOWS, importance)
    names = [n for n, m in model.named_modules() if only_decoder(m, n)]
    quantize_(model, prepare, filter_fn=only_decoder)
    for window in WINDOWS.split(1):
        out = model(input_ids=window, use_cache=False).logits
        nn.functional.cross_entropy(out[0, :-1], window[0, 1:], reduction="sum").backward()
    if convert_as == "copied":
        model = copy.deepcopy(model)
    for name in names:
        found = model.get_submodule(name).importance()
        torch.testing.assert_close(found.input, expected[name].input, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.output, expected[name].output, rtol=1e-3, atol=1e-3)
        assert (found.input_correlation is None) == (curvature == "diagonal")
        assert (found.output_correlation is None) == (curvature != "both")
    quantize_(model, convert, filter_fn=only_decoder)
    assert all(isinstance(model.get_submodule(n).weight, PackedBinaryTensor) for n in names)
    assert not any(isinstance(m, ObservedLinear) or m._forward_hooks for m in model.modules())


def test_observed_importances_give_a_better_output_than_none():
    errors = {}
    x, weight = skewed_batch()
    target = two_layers()(x).detach()
    for name, steps in {"blind": [CONFIG], "observed": [PREPARE, CONVERT]}.items():
        model = two_layers()
        quantize_(model, steps[0])
        if len(steps) > 1:
            observe(model)
            quantize_(model, steps[1])
        with torch.no_grad():
            errors[name] = float(((model(x) - target).square() * weight).mean())
    assert errors["observed"] < 0.9 * errors["blind"]


def test_preparing_changes_neither_outputs_nor_parameters():
    model, x = two_layers(), torch.randn(5, 64)
    before, parameters = model(x), dict(model.named_parameters())
    quantize_(model, PREPARE)
    assert isinstance(model[0], ObservedLinear)
    assert torch.equal(model(x), before)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_preparing_twice_goes_on_with_what_was_seen():
    model = two_layers()
    quantize_(model, PREPARE)
    observe(model)
    quantize_(model, PREPARE)
    assert model[0].tokens() == {"inputs": 256, "output gradients": 256}
    assert "inputs=256 tokens, output gradients=256 tokens" in repr(model)


def test_the_seed_decides_the_signs():
    def signs(seed):
        model = two_layers()
        quantize_(model, dataclasses.replace(CONFIG, run=RunConfig(seed=seed)))
        return model[0].weight.u_signs

    assert torch.equal(signs(0), signs(0)) and not torch.equal(signs(0), signs(1))


@pytest.mark.parametrize("head", [False, True], ids=["decoder", "head_too"])
def test_a_quantized_transformers_model_saves_and_reloads_bit_for_bit(head, tmp_path):
    model = tiny_llama()
    quantize_(model, CONFIG, **({} if head else {"filter_fn": only_decoder}))
    with torch.no_grad():
        expected = model(input_ids=WINDOWS).logits
    nanoquant.pack_model(model)
    nanoquant.save_pretrained(model, tmp_path / "out")
    loaded = nanoquant.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=WINDOWS).logits, expected)


def test_what_presets_say_of_whole_models_leaves_single_linears_as_they_are():
    plain, preset = two_layers(), two_layers()
    quantize_(plain, CONFIG)
    quantize_(preset, nanoquant_config(1.5, budget={"rank_multiple": 8}, admm={"iterations": 20}))
    assert torch.equal(plain[0].weight.dequantize(), preset[0].weight.dequantize())
