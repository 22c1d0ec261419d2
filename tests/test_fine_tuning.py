"""Fine-tuning of packed models: adapters and scales learn, signs stay, folders come back, and misfits are named."""

import copy
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packed_models import pack_randomly
from peft import LoraConfig, get_peft_model
from tiny_models import random_windows, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer
from torch.nn import functional as F

import nanoquant
from nanoquant import fine_tuning
from nanoquant.adapters import load_adapter, require_peft
from nanoquant.data import load_tokens
from nanoquant.fine_tune_config import FineTuneConfig, split_windows
from nanoquant.fine_tuning import fine_tune, targets_of
from nanoquant.int8_activations import use_exact_activations, use_int8_activations
from nanoquant.optimizer import OptimizerConfig
from nanoquant.packed_layers import packed_modules
from nanoquant.product_budget import ProductShape
from nanoquant.shared_launch import share_launches

TEXT = Path(__file__).parents[1] / "recipes" / "data" / "wiki_test.txt"
LOOK_UPS = ProductShape(4, (4,), 1)
QUICK = {
    "rank": 4,
    "length": 64,
    "windows": 48,
    "batch": 4,
    "held_out": 4,
    "lora_lr": 1e-2,
    "optimizer": OptimizerConfig(beta2=0.95, clip_norm=1.0, warmup=2),
}


def packed(size=32, dtype=torch.float32, **changes):
    return pack_randomly(tiny_llama(dtype=dtype, **changes), size, scale_dtype=dtype)


def windows_of(config):
    tokens = load_tokens(TEXT, tiny_tokenizer())[:20_000]
    return split_windows(tokens, config)


def codes(model):
    return {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}


def wake(model):
    """Give new adapters an effect, always the same: their second matrices begin at 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def lora(**settings):
    return LoraConfig(r=4, target_modules="all-linear", **settings)


@pytest.mark.parametrize("taught", [False, True], ids=["text", "teacher"])
@pytest.mark.parametrize("train", ["lora", "scales"])
@pytest.mark.parametrize("size", [32, LOOK_UPS], ids=["signs", "look-ups"])
def test_held_out_loss_falls_on_real_text_and_codes_stay_bit_for_bit(size, train, taught):
    config = FineTuneConfig(train=train, **QUICK)
    model = packed(size)
    before = codes(model)
    teacher = tiny_llama() if taught else None
    tuned, report = fine_tune(model, *windows_of(config), config, teacher)
    assert report.best_step > 0
    assert report.held_out[report.best_step] < report.held_out[0] - 0.01
    after = codes(tuned.unload() if train == "lora" else tuned)
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in tuned.parameters())


def test_a_bfloat16_model_trains_in_float32_and_is_left_in_bfloat16():
    for train in ("lora", "scales"):
        config = FineTuneConfig(train=train, **QUICK)
        tuned, report = fine_tune(packed(dtype=torch.bfloat16), *windows_of(config), config)
        assert report.best_step > 0
        floats = {p.dtype for p in tuned.parameters() if p.is_floating_point()}
        assert floats == {torch.bfloat16}


def test_training_that_breaks_ends_in_the_best_state_that_there_was(monkeypatch, caplog):
    forward, calls = fine_tuning.TuningObjective.forward, []

    def breaks(self, batch):
        calls.append(0)
        return forward(self, batch) * (1.0 if len(calls) < 9 else float("nan"))

    monkeypatch.setattr(fine_tuning.TuningObjective, "forward", breaks)
    config = FineTuneConfig(**QUICK)
    tuned, report = fine_tune(packed(), *windows_of(config), config)
    assert report.best_step in (3, 6) and "the state of step" in caplog.text
    _, held_out = windows_of(config)
    objective = fine_tuning.TuningObjective(tuned, None, [])
    found = objective.held_out(held_out, "32-true")
    assert found == pytest.approx(report.held_out[report.best_step], rel=1e-6)


def test_the_same_seed_gives_the_same_adapter():
    config = FineTuneConfig(**QUICK)
    (one, _), (two, _) = (fine_tune(packed(), *windows_of(config), config) for _ in range(2))
    pairs = zip(one.named_parameters(), two.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_all_linear_means_packed_layers_too(make):
    model = pack_randomly(make(), 32)
    names = set(packed_modules(model))
    wrapped = get_peft_model(model, lora())
    found = {n for n, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found == names


def test_a_packed_head_gets_no_adapter_by_all_linear_but_by_name():
    model = pack_randomly(tiny_llama(tie=False), 32, head=True)
    wrapped = get_peft_model(copy.deepcopy(model), lora())
    assert not hasattr(wrapped.get_base_model().lm_head, "lora_A")
    named = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    assert hasattr(named.get_base_model().lm_head, "lora_A")


def test_a_second_adapter_reaches_the_same_layers():
    wrapped = get_peft_model(packed(), lora())
    wrapped.add_adapter("second", lora())
    layers = [m for m in wrapped.modules() if hasattr(m, "lora_A")]
    assert all(set(layer.lora_A) == {"default", "second"} for layer in layers)


@pytest.mark.parametrize("size", [32, LOOK_UPS], ids=["signs", "look-ups"])
def test_loss_and_gradients_are_those_of_a_dense_twin(size):
    dense = copy.deepcopy(packed(size)).dequantize()
    one = wake(get_peft_model(packed(size), lora()))
    two = wake(get_peft_model(dense, lora()))
    windows = random_windows(2, 16)
    for model in (one, two):
        logits = model(windows).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).backward()
    twins = dict(two.named_parameters())
    trained = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    assert len(trained) == 28
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, twins[name].grad, rtol=1e-3, atol=1e-5)


def test_shared_launches_do_not_bypass_adapters():
    model = packed()
    wrapped = wake(get_peft_model(model, lora()))
    windows = random_windows(1, 4)
    with torch.no_grad():
        before = wrapped(windows).logits
        share_launches(wrapped, packed_modules(wrapped))
        assert any(layer.shared for layer in packed_modules(wrapped).values())
        torch.testing.assert_close(wrapped(windows).logits, before)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(windows).logits, before, atol=1e-2)


def test_8_bit_activations_keep_adapters_and_refuse_to_train():
    model = packed()
    use_int8_activations(model, random_windows(1, 64), most_error=1.0)
    wrapped = wake(get_peft_model(model, lora()))
    windows = random_windows(1, 8)
    with torch.no_grad():
        rounded = wrapped(windows).logits
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(windows).logits, rounded, atol=1e-2)
        use_exact_activations(wrapped)
        torch.testing.assert_close(wrapped(windows).logits, rounded, rtol=0.1, atol=0.5)
    model = packed()
    use_int8_activations(model, random_windows(1, 64), most_error=1.0)
    config = FineTuneConfig(**QUICK)
    with pytest.raises(ValueError, match="use_exact_activations"):
        fine_tune(model, *windows_of(config), config)


def test_trained_scales_are_a_checkpoint(tmp_path):
    config = FineTuneConfig(train="scales", **QUICK)
    tuned, _ = fine_tune(packed(), *windows_of(config), config)
    nanoquant.save_pretrained(tuned, tmp_path / "out")
    windows = random_windows(2, 16)
    assert torch.equal(nanoquant.load(tmp_path / "out")(windows).logits, tuned(windows).logits)


def test_scales_that_trained_are_of_no_checkpoint_until_they_are_saved(tmp_path):
    nanoquant.save_pretrained(packed(), tmp_path / "out")
    model = nanoquant.load(tmp_path / "out")
    before = model.config.quantization_config.checkpoint_id
    config = FineTuneConfig(**QUICK, train="scales")
    tuned, _ = fine_tune(model, *windows_of(config), config)
    assert before and tuned.config.quantization_config.checkpoint_id is None


def test_dense_linears_of_a_partly_packed_model_get_no_lora():
    model = packed()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64, bias=False)
    config = FineTuneConfig(**QUICK, targets="q_proj")
    assert targets_of(model, config) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    "settings, named",
    [({"use_dora": True}, "plain LoRA alone"), ({"init_lora_weights": "pissa"}, "'pissa' changes")],
)
def test_lora_that_would_change_the_packed_weight_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        get_peft_model(packed(), lora(**settings))


def test_what_can_not_be_trained_is_named_before_anything_changes():
    config = FineTuneConfig(**QUICK)
    parts = windows_of(config)
    with pytest.raises(ValueError, match="no linear of the model is packed"):
        fine_tune(tiny_llama(), *parts, config)
    with pytest.raises(ValueError, match=r"'qproj'.*down_proj.*did you mean q_proj\?"):
        fine_tune(packed(), *parts, FineTuneConfig(targets="k_proj,qproj", **QUICK))
    with pytest.raises(ValueError, match="the teacher has 99 tokens, the model 128"):
        fine_tune(packed(), *parts, config, tiny_llama(vocab_size=99))
    with pytest.raises(ValueError, match="at most 15 windows"):
        split_windows(torch.zeros(1000, dtype=torch.long), config)
    with pytest.raises(ValueError, match="lora or scales, got 'signs'"):
        FineTuneConfig(train="signs")


def test_peft_that_is_absent_or_too_old_is_named(monkeypatch):
    model = packed()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.1")
    with pytest.raises(ValueError, match=r"0\.19 or newer, got 0\.18\.1: pip install"):
        require_peft()
    with pytest.raises(ValueError, match=r"got 0\.18\.1"):
        get_peft_model(model, lora())

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ValueError, match=r"not installed: pip install 'nanoquant\[tune\]'"):
        fine_tune(model, *windows_of(FineTuneConfig(**QUICK)), FineTuneConfig(**QUICK))


def test_dense_linears_get_the_lora_of_peft_itself():
    wrapped = get_peft_model(tiny_llama(), lora())
    kinds = {type(m) for m in wrapped.modules() if hasattr(m, "lora_A")}
    assert kinds == {peft.tuners.lora.Linear}
    wrapped.merge_and_unload()


@pytest.mark.parametrize("train", ["lora", "scales"])
def test_the_recipe_reports_before_and_after_and_leaves_a_folder(train, tmp_path):
    tokenizer = tiny_tokenizer()
    nanoquant.save_pretrained(packed(), tmp_path / "packed", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    sizes = ["--tune.length=64", "--tune.windows=40", "--tune.held_out=4", "--tune.batch=4"]
    rates = ["--tune.lora_lr=1e-2", "--tune.rank=4", f"--tune.train={train}"]
    flags = ["--text", tmp_path / "text.txt", "--json", tmp_path / "a.json", *sizes, *rates]
    done = recipe(tmp_path / "packed", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["loss"]["after"] < found["loss"]["before"]
    assert "fine-tune" in done.stderr and str(found["bytes"]) in done.stdout.replace(",", "")
    if train == "lora":
        load_adapter(nanoquant.load(tmp_path / "packed"), tmp_path / "out")
    else:
        config = nanoquant.load(tmp_path / "out").config.quantization_config
        assert config.recipe["fine_tuning"]["train"] == "scales"


def test_the_recipe_names_a_missing_text(tmp_path):
    nanoquant.save_pretrained(packed(), tmp_path / "packed", tokenizer=tiny_tokenizer())
    done = recipe(
        tmp_path / "packed", tmp_path / "out", "--text", tmp_path / "none.txt", "--tune.length=64"
    )
    assert done.returncode == 1 and "found no file" in done.stderr and not done.stdout


def recipe(*arguments):
    file = Path(__file__).parents[1] / "recipes" / "fine_tune.py"
    command = [sys.executable, str(file), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
