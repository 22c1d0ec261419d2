"""8-bit activations are on where their error on the user's text allows it, and nowhere else."""

import copy
import json
import logging
import math

import pytest
import torch
from command_line import WORDS, call, refused
from packed_models import pack_randomly
from tiny_models import random_windows, tiny_gpt2, tiny_llama, tiny_tokenizer

import nanoquant
from nanoquant import int8_activations, packed_linear
from nanoquant.generate import generate
from nanoquant.generation_settings import GenerationSettings
from nanoquant.int8_activations import (
    Int8Config,
    read_windows,
    use_exact_activations,
    use_int8_activations,
)
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.shared_launch import share_launches
from nanoquant_kernels import int8_reference

WINDOWS = random_windows(2, 12)


@pytest.fixture
def model():
    return pack_randomly(tiny_llama())


def packed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}


def switched(model):
    return {n for n, m in packed(model).items() if m.int8_activations}


@torch.no_grad()
def logits(model):
    return model(WINDOWS).logits


def test_a_limit_of_0_leaves_every_layer_exact(model):
    before = logits(model)
    report = use_int8_activations(model, WINDOWS, most_error=0)
    assert not switched(model) and not report.on and set(report.exact) == set(packed(model))
    assert report.divergence == 0
    assert torch.equal(logits(model), before)


def test_a_large_limit_switches_every_layer_on_and_all_come_back(model):
    before = logits(model)
    report = use_int8_activations(model, WINDOWS, most_error=1)
    assert switched(model) == set(report.on) == set(packed(model)) and not report.exact
    after = logits(model)
    assert 0 < (after - before).norm() < 0.05 * before.norm()
    use_exact_activations(model)
    assert not switched(model) and torch.equal(logits(model), before)


def test_a_limit_in_between_divides_the_layers_by_their_own_error(model):
    errors = use_int8_activations(model, WINDOWS, most_error=1).on
    limit = sorted(errors.values())[len(errors) // 2]
    report = use_int8_activations(model, WINDOWS, most_error=limit)
    assert report.on == {n: e for n, e in errors.items() if e <= limit}
    assert report.exact == {n: e for n, e in errors.items() if e > limit}
    assert switched(model) == set(report.on) and report.exact


@torch.no_grad()
def test_the_error_is_that_of_the_layer_on_its_own_inputs(model):
    name = "model.layers.1.mlp.down_proj"
    layer, inputs = packed(model)[name], []
    with layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        model(WINDOWS[:1])
    x = inputs[0][0]
    wanted, y = layer(x), int8_reference.binary_low_rank_linear_int8(x, *layer.operands())
    error = ((y - wanted).norm(dim=-1) / wanted.norm(dim=-1)).square().mean().sqrt().item()
    report = use_int8_activations(model, WINDOWS[0])
    assert (report.on | report.exact)[name] == pytest.approx(error, rel=0.05)


@torch.no_grad()
def test_the_divergence_is_that_of_the_predictions(model):
    before = logits(model).log_softmax(-1)
    report = use_int8_activations(model, WINDOWS, most_error=1)
    after = logits(model).log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1).mean().item()
    assert report.divergence == pytest.approx(wanted, rel=0.02, abs=1e-7)
    assert report.tokens == WINDOWS.numel()


def test_what_was_switched_is_logged_in_one_line(model, caplog):
    with caplog.at_level(logging.INFO, logger="nanoquant"):
        report = use_int8_activations(model, WINDOWS, most_error=1)
    count = len(packed(model))
    assert f"in {count} of {count} packed linears" in report.line()
    assert [r.getMessage() for r in caplog.records if "8-bit" in r.getMessage()] == [report.line()]


def test_without_the_compiled_loop_it_works_and_says_that_no_time_is_saved(
    model, monkeypatch, caplog
):
    monkeypatch.setattr(int8_activations, "available_int8_paths", tuple)
    assert use_int8_activations(model, WINDOWS, most_error=1).on
    assert "save no time" in caplog.text


def test_a_layer_that_the_text_does_not_reach_stays_exact():
    model = pack_randomly(tiny_llama())
    model.spare = copy.deepcopy(next(iter(packed(model).values())))
    report = use_int8_activations(model, WINDOWS, most_error=1)
    assert math.isnan(report.exact["spare"]) and "spare" not in switched(model)


@pytest.mark.parametrize("fails", ["_layer_errors", "_divergence"])
def test_a_measurement_that_fails_leaves_every_layer_exact(model, monkeypatch, fails):
    use_int8_activations(model, WINDOWS, most_error=1)
    inner = getattr(int8_activations, fails)
    monkeypatch.setattr(int8_activations, fails, lambda *args: (inner(*args), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        use_int8_activations(model, WINDOWS, most_error=1)
    assert not switched(model)


def test_it_goes_with_shared_launches_and_other_architectures(model):
    share_launches(model, packed(model))
    before = logits(model)
    use_int8_activations(model, WINDOWS, most_error=1)
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()
    use_exact_activations(model)
    assert torch.equal(logits(model), before)
    assert use_int8_activations(pack_randomly(tiny_gpt2()), WINDOWS, most_error=1).on


def test_training_mode_is_left_as_it_was(model):
    model.train()
    use_int8_activations(model, WINDOWS)
    assert model.training


@pytest.mark.parametrize("own", [True, False], ids=["nanoquant", "transformers"])
def test_text_is_generated_with_it(model, own):
    tokenizer = tiny_tokenizer()
    use_int8_activations(model, WINDOWS, most_error=1)
    if own:
        settings = GenerationSettings(max_new_tokens=4, temperature=0)
        assert generate(model, tokenizer, "the river", settings).new_tokens[0] >= 1
    else:
        ids = tokenizer("the river", return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > ids.shape[1]


def test_a_saved_checkpoint_does_not_know_of_it(model, tmp_path):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    use_int8_activations(model, WINDOWS, most_error=1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    nanoquant.save_pretrained(model, tmp_path / "out")
    assert not switched(nanoquant.load(tmp_path / "out"))


def test_on_another_device_the_exact_layer_serves(model, monkeypatch):
    use_int8_activations(model, WINDOWS, most_error=1)
    monkeypatch.setattr(packed_linear, "binary_low_rank_linear_int8", None)
    ids = WINDOWS.to("meta")
    assert model.to("meta")(ids).logits.shape[:2] == ids.shape


def test_training_in_it_is_refused(model):
    use_int8_activations(model, WINDOWS, most_error=1)
    with pytest.raises(ValueError, match="no gradients"):
        model(WINDOWS, labels=WINDOWS)


def test_bad_input_is_named(model):
    for ids, words in (
        (torch.zeros(0, dtype=torch.long), "integers"),
        (torch.zeros(1, 4), "integers"),
        (torch.tensor([-1, 3]), "ids -1 to 3"),
        (torch.tensor([3, 10**6]), "the model has 0 to"),
    ):
        with pytest.raises(ValueError, match=words):
            use_int8_activations(model, ids)
    for limit in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="most_error"):
            use_int8_activations(model, WINDOWS, limit)
    with pytest.raises(ValueError, match="no packed linear"):
        use_int8_activations(tiny_llama(), WINDOWS)
    with pytest.raises(ValueError, match="is on meta"):
        use_int8_activations(model.to("meta"), WINDOWS)


def test_windows_of_a_text_are_as_many_as_asked_or_as_there_are(tmp_path):
    tokenizer, file = tiny_tokenizer(), tmp_path / "text.txt"
    file.write_text("the river runs over stone and light falls " * 20)
    assert read_windows(file, tokenizer, Int8Config(tokens=24, length=8)).shape == (3, 8)
    file.write_text("the river runs")
    windows = read_windows(file, tokenizer, Int8Config())
    assert windows.tolist() == [tokenizer("the river runs")["input_ids"]]
    with pytest.raises(ValueError, match="length is 1"):
        Int8Config(length=1)


@pytest.fixture
def folder(model, tmp_path):
    """A packed checkpoint beside a text."""
    nanoquant.save_pretrained(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    (tmp_path / "text.txt").write_text(WORDS * 20)  # windows longer than the model's positions
    return tmp_path


@pytest.mark.usefixtures("untouched_process")
def test_generate_measures_says_and_writes_what_it_switched(folder, capsys):
    flags = ["--prompt", "the river", "--max-new-tokens", 3, "--json", folder / "figures.json"]
    flags += ["--int8-text", folder / "text.txt", "--int8-error", 0.5]
    code, _, err = call(capsys, "generate", folder / "out", *flags)
    found = json.loads((folder / "figures.json").read_text())
    assert code == 0 and "8-bit activations in 14 of 14 packed linears" in err
    assert len(found["int8"]["on"]) == 14 and found["int8"]["most_error"] == 0.5
    assert found["texts"]


@pytest.mark.usefixtures("untouched_process")
def test_generate_refuses_a_limit_without_a_text_and_a_text_that_is_not_there(folder, capsys):
    base = ["generate", folder / "out", "--prompt", "the river"]
    assert "--int8-text FILE" in refused(capsys, *base, "--int8-error", 0.5)
    assert "most_error is -1.0" in refused(capsys, *base, "--int8-error", -1)
    assert "found no file" in refused(capsys, *base, "--int8-text", folder / "text.tx")
