"""Baselines: every name of the registry runs, stores the bits that it claims, and errs as its method does."""

import copy
import io
import math

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_gpt2, tiny_llama
from torch import nn

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.baselines.binary import ranks_with_middle
from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.factorize import (
    dual_svid,
    row_and_column_scales,
    row_scales,
    sign_svd,
    truncated_svd,
)
from nanoquant.baselines.layers import MiddleScaleLinear, SignLinear
from nanoquant.baselines.registry import BASELINES, apply_baseline, check_shapes, find_baseline
from nanoquant.baselines.target import Target
from nanoquant.binary import relative_error, sign
from nanoquant.budget import SCALE_BITS, BudgetConfig, body_bits, layer_bits
from nanoquant.importance import Importance
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.sizes import measure_sizes, packed_parts

CONFIG = BaselineConfig(text="text", group_size=32, bits=2.0)
RUNNING = [name for name, baseline in BASELINES.items() if baseline.apply]
WINDOWS = random_windows(3, 16)


def quantized(name, model=None, config=CONFIG):
    model = copy.deepcopy(model or tiny_llama(dtype=torch.bfloat16))
    target = Target.of(model)
    apply_baseline(name, target, config, WINDOWS)
    return target


def body_tensors(target):
    for linear in target.linears().values():
        for tensor in (*linear.parameters(), *linear.buffers()):
            if tensor is not linear.bias:
                yield from packed_parts(tensor)


def saved_bytes(tensors):
    """Bytes of the storages that torch.save would write."""
    total = 0
    for tensor in tensors:
        file = io.BytesIO()
        torch.save(tensor.detach().clone().contiguous().view(torch.uint8), file)
        total += torch.load(io.BytesIO(file.getvalue())).numel()
    return total


def dense_of(linear):
    """The dense weight that a linear applies, from its own forward pass on unit vectors."""
    eye = torch.eye(linear.in_features, dtype=torch.bfloat16)
    bias = 0 if linear.bias is None else linear.bias
    return (linear(eye) - bias).mT.float()


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_baseline_runs_and_changes_only_the_linears_of_the_decoder(name, dtype):
    model = tiny_llama(dtype=dtype)
    target = quantized(name, model)
    logits = target.model(input_ids=WINDOWS).logits
    assert logits.isfinite().all()
    kept = dict(target.model.named_parameters())
    inside = tuple(target.shapes)
    for key, parameter in model.named_parameters():
        if not key.startswith(inside):
            assert torch.equal(parameter.to(kept[key].dtype), kept[key])


@pytest.mark.parametrize("name", RUNNING)
def test_true_bits_are_the_bytes_that_are_stored(name):
    target = quantized(name)
    sizes = target.sizes()
    weights = sum(d_out * d_in for d_out, d_in in target.shapes.values())
    assert sizes.body_weights == weights
    assert sizes.body_bits_per_weight * weights == pytest.approx(
        8 * saved_bytes(body_tensors(target))
    )
    rest = sum(p.numel() for key, p in tiny_llama().named_parameters()) - weights
    whole = sizes.body_bits_per_weight * weights + 16 * rest  # a tied head counts once
    assert sizes.model_bits_per_parameter == pytest.approx(whole / (weights + rest))
    assert sizes.bytes_on_disk == pytest.approx(whole / 8)
    assert sizes.parameters == weights + rest


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("bf16", 16),
        ("int4", 4 + 32 / 32),
        ("int3", 3 + 24 / 32),
        ("int2", 2 + 24 / 32),
        ("int1", 1 + 24 / 32),
        ("hqq4", 4 + 16 / 32),
        ("hqq3", 3 + 16 / 32),
        ("hqq2", 2 + 16 / 32),
        ("hqq1", 1 + 16 / 32),
    ],
)
def test_codes_and_the_metadata_of_groups_are_all_that_is_counted(name, bits):
    assert quantized(name).sizes().body_bits_per_weight == pytest.approx(bits)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_awq_stores_one_scale_of_inputs_more_than_its_integers(bits):
    plain, awq = quantized(f"int{bits}"), quantized(f"awq{bits}")
    inputs = sum(d_in for _, d_in in plain.shapes.values())
    more = 8 * (saved_bytes(body_tensors(awq)) - saved_bytes(body_tensors(plain)))
    assert more == 16 * inputs


@pytest.mark.parametrize("name", ["sign-svd", "nanoquant-init"])
def test_factors_are_counted_as_those_of_nanoquant(name):
    target = quantized(name)
    ours = measure_sizes(target.model)
    assert target.sizes().to_dict() == pytest.approx(ours.to_dict())
    assert ours.body_bits_per_weight <= CONFIG.bits


def test_the_scale_of_a_rank_is_paid_from_the_same_budget():
    shapes = {"a": (64, 64), "b": (96, 64), "c": (64, 96)}
    ranks = ranks_with_middle(shapes, 2.0)
    used = sum(layer_bits(*shapes[k], r) + SCALE_BITS * r for k, r in ranks.items())
    assert used <= 2.0 * sum(a * b for a, b in shapes.values())
    sizes = quantized("dual-svid").sizes()
    assert 0.8 * CONFIG.bits < sizes.body_bits_per_weight <= CONFIG.bits


def test_bits_that_leave_nothing_for_the_scales_of_ranks_are_refused_before_any_work():
    shapes = {"a": (64, 64)}
    least = body_bits(shapes, {"a": BudgetConfig().rank_multiple})
    check_shapes(f"sign-svd@{least}", shapes, CONFIG)
    with pytest.raises(ValueError, match="does not suffice for a scale a rank beside the signs"):
        check_shapes(f"dual-svid@{least}", shapes, CONFIG)


def test_bits_after_the_name_win():
    baseline, config = find_baseline("sign-svd@1.7", CONFIG)
    assert config.bits == 1.7 and baseline is BASELINES["sign-svd"]
    assert quantized("sign-svd@1.7").sizes().body_bits_per_weight <= 1.7
    assert 2.6 < quantized("nanoquant-init@2.9").sizes().body_bits_per_weight <= 2.9


@pytest.mark.parametrize("kind", ["int", "hqq", "awq"])
def test_more_bits_give_a_smaller_error(kind):
    model = tiny_llama(dtype=torch.bfloat16)
    dense = {key: p.float() for key, p in model.named_parameters()}
    errors = []
    for bits in (2, 3, 4):
        target = quantized(f"{kind}{bits}", model)
        parts = [
            relative_error(dense[f"{name}.weight"], dense_of(linear))
            for name, linear in target.linears().items()
        ]
        errors.append(torch.stack(parts).mean().item())
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["int", "hqq"])
def test_packed_integers_are_exactly_those_of_torchao(bits, kind):
    from torchao.quantization import quantize_

    from nanoquant.baselines.integers import _packed_config

    torch.manual_seed(0)
    packed, whole = (nn.Sequential(nn.Linear(96, 40, dtype=torch.bfloat16)) for _ in range(2))
    whole.load_state_dict(packed.state_dict())
    config = _packed_config(bits, 32, kind == "hqq")
    quantize_(packed, config)
    quantize_(whole, config.base)
    assert torch.equal(packed[0].weight.unpacked().qdata, whole[0].weight.qdata)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(packed(x), whole(x))


def matrices():
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(96, 160, generator=generator)
    low_rank = torch.randn(96, 24, generator=generator) @ torch.randn(24, 160, generator=generator)
    return {"gaussian": gaussian, "low rank": low_rank + gaussian}


@pytest.mark.parametrize("W", matrices().values(), ids=matrices())
def test_a_scale_of_columns_never_makes_signs_worse(W):
    alpha = row_scales(W)
    a, b = row_and_column_scales(W)
    plain = relative_error(W, alpha.unsqueeze(-1) * sign(W))
    assert relative_error(W, torch.outer(a, b) * sign(W)) <= plain
    for factor in (0.9, 1.1):  # alpha is the minimum
        assert relative_error(W, factor * alpha.unsqueeze(-1) * sign(W)) > plain


@pytest.mark.parametrize("W", matrices().values(), ids=matrices())
def test_signs_of_factors_lose_to_the_factors_and_dual_svid_is_no_worse_than_plain_signs(W):
    U, V = truncated_svd(W, 48)
    best = relative_error(W, U @ V.mT)
    plain = relative_error(W, sign_svd(W, 48).dense())
    layer = MiddleScaleLinear(*dual_svid(W, 48), None)
    assert best < relative_error(W, layer.dequantize()) <= plain < 1


@pytest.mark.parametrize("W", matrices().values(), ids=matrices())
def test_admm_beats_both_at_the_same_rank(W):
    one = Importance(input=torch.ones(160), output=torch.ones(96))
    ours = ADMMInitializer(ADMMConfig(iterations=40))(W, one, 48, torch.Generator().manual_seed(0))
    layer = MiddleScaleLinear(*dual_svid(W, 48), None)
    assert relative_error(W, ours.dense()) < relative_error(W, layer.dequantize())


@pytest.mark.parametrize("columns", [False, True])
def test_a_sign_layer_applies_its_dense_weight(columns):
    W, bias = torch.randn(24, 41), torch.randn(24)
    a, b = row_and_column_scales(W)
    layer = SignLinear(W, a, b if columns else None, bias)
    x = torch.randn(3, 41)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().mT + bias)
    wanted = a.bfloat16().float().unsqueeze(-1) * sign(W)
    wanted = wanted * b.bfloat16().float() if columns else wanted
    torch.testing.assert_close(layer.dequantize(), wanted)


def test_middle_scales_of_one_give_the_layer_of_nanoquant():
    factors = sign_svd(torch.randn(24, 41), 16)
    plain = BinaryLowRankLinear.from_factors(factors, torch.randn(24))
    parts = (factors.U, factors.V, factors.s1.bfloat16(), torch.ones(16), factors.s2.bfloat16())
    layer = MiddleScaleLinear(*parts, plain.bias)
    with torch.no_grad():
        plain.s1.copy_(plain.s1.bfloat16())
        plain.s2.copy_(plain.s2.bfloat16())
    x = torch.randn(3, 41)
    torch.testing.assert_close(layer(x), plain(x))


def test_linears_stored_transposed_are_the_same_linears():
    model = tiny_gpt2()
    before = model(input_ids=WINDOWS).logits
    target = Target.of(copy.deepcopy(model))
    torch.testing.assert_close(target.model(input_ids=WINDOWS).logits, before)
    apply_baseline("int8", target, CONFIG)
    after = target.model(input_ids=WINDOWS).logits
    assert relative_error(before.flatten(0, 1), after.flatten(0, 1)) < 0.01


@pytest.mark.parametrize("family", ["gemma3", "opt", "phi3"])
@pytest.mark.parametrize("name", ["int4", "awq3", "xnor"])
def test_other_families_run(family, name):
    target = quantized(name, FAMILIES[family](dtype=torch.bfloat16))
    assert target.model(input_ids=WINDOWS).logits.isfinite().all()
    assert math.isfinite(target.sizes().body_bits_per_weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int5", "no baseline 'int5'; nearest: int[1248]"),
        ("rtn-1", "nearest: rtn1"),
        ("int4@3", "int4 has bits of its own"),
        ("sign-svd@x", "no number; write sign-svd@0.8"),
        ("gptq3", "gptq3 is not available: torchao .* CUDA"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_baseline(name, CONFIG)


def test_text_that_is_needed_is_asked_for():
    with pytest.raises(ValueError, match="awq4 needs calibration text"):
        find_baseline("awq4", BaselineConfig())


@pytest.mark.parametrize("name", ["int4", "int2", "hqq3", "awq4"])
def test_groups_that_do_not_fit_are_refused_and_nothing_stays_dense_in_silence(name):
    config = BaselineConfig(text="text", group_size=64)
    with pytest.raises(ValueError, match="does not divide the 96 inputs of .*that fit all .* 32"):
        quantized(name, config=config)


@pytest.mark.parametrize("change", [{"group_size": 48}, {"bits": 0.0}, {"windows": 0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        BaselineConfig(**change)
