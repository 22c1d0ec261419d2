"""Compiled blocks compute what uncompiled ones do, and training goes on where nothing compiles."""

import contextlib

import needs
import pytest
import torch
from packed_models import random_factors, replace_linears
from tiny_models import random_windows, tiny_llama

from nanoquant import model_reconstruction
from nanoquant.compiling import MOST_KINDS, binary_blocks, compiled, uncompiled
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_reconstruction import ModelConfig, ModelReconstructor

WINDOWS = random_windows(4, 16)


def student():
    return replace_linears(tiny_llama())


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=WINDOWS).logits.square().mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_blocks_are_those_that_hold_binary_layers():
    model = student()
    assert binary_blocks(model) == list(model.model.layers)
    model.model.layers[0] = tiny_llama().model.layers[0]
    assert binary_blocks(model) == [model.model.layers[1]]
    assert binary_blocks(tiny_llama()) == []


@needs.compiler
def test_compiled_blocks_compute_the_same():
    model = student()
    loss, gradients = loss_and_gradients(model)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS).logits
    frames = torch._dynamo.utils.counters["frames"]
    with compiled(binary_blocks(model)):
        before = frames["ok"]
        fast_loss, fast_gradients = loss_and_gradients(model)
        assert frames["ok"] > before
        with torch.no_grad(), uncompiled():
            assert torch.equal(model(input_ids=WINDOWS).logits, logits)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert fast_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-3, atol=1e-6)
    assert not any("forward" in vars(block) for block in model.model.layers)
    assert loss_and_gradients(model)[0] == loss


def test_without_a_compiler_blocks_stay_as_they_are_and_the_reason_is_named(monkeypatch, caplog):
    def fail(x):
        raise RuntimeError("No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    model = student()
    with compiled(binary_blocks(model)):
        assert not any("forward" in vars(block) for block in model.model.layers)
    assert "uncompiled, which is slower: torch.compile fails here (No working C++" in caplog.text
    assert "more lines" not in caplog.text


def test_blocks_of_too_many_shapes_are_not_compiled(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", None)
    ranks = range(1, MOST_KINDS + 2)
    blocks = [BinaryLowRankLinear.from_factors(random_factors(16, 16, rank)) for rank in ranks]
    with compiled(blocks):
        pass
    assert f"they have {MOST_KINDS + 1} different shapes" in caplog.text


@pytest.mark.parametrize(("threshold", "expected"), [(None, 0), (3, 0), (2, 1)], ids=str)
def test_only_long_training_compiles(threshold, expected, monkeypatch):
    entered = []
    monkeypatch.setattr(
        model_reconstruction,
        "compiled",
        lambda blocks: entered.append(blocks) or contextlib.nullcontext(),
    )
    model = student()
    config = ModelConfig(windows=4, batch=2, held_out=1, compile_from=threshold)
    ModelReconstructor(config)(model, tiny_llama().requires_grad_(False), WINDOWS, WINDOWS[:1])
    assert entered == [binary_blocks(model)] * expected
