"""Compiled blocks compute what uncompiled ones do, and training goes on where nothing compiles."""

import contextlib
import functools

import needs
import pytest
import torch
from packed_models import random_factors, replace_linears
from tiny_models import random_windows, tiny_llama

from nanoquant import model_reconstruction
from nanoquant.compiling import compiled, quantized_blocks, uncompiled
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_config import ModelConfig
from nanoquant.model_reconstruction import ModelObjective, ModelReconstructor

WINDOWS = random_windows(4, 16)


def student(frozen=False):
    model = replace_linears(tiny_llama())
    for module in model.modules():
        if frozen and isinstance(module, BinaryLowRankLinear):
            module.freeze()
    return model


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=WINDOWS).logits.square().mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_blocks_are_those_that_hold_binary_layers():
    model = student()
    assert quantized_blocks(model) == list(model.model.layers)
    model.model.layers[0] = tiny_llama().model.layers[0]
    assert quantized_blocks(model) == [model.model.layers[1]]
    assert quantized_blocks(tiny_llama()) == []


@needs.compiler
@pytest.mark.parametrize(
    "frozen", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["latent", "frozen"]
)
def test_compiled_blocks_compute_the_same(frozen):
    model = student(frozen)
    loss, gradients = loss_and_gradients(model)
    with torch.no_grad():
        logits = model(input_ids=WINDOWS).logits
    frames = torch._dynamo.utils.counters["frames"]
    with compiled(quantized_blocks(model)):
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
    with compiled(quantized_blocks(model)):
        assert not any("forward" in vars(block) for block in model.model.layers)
    assert "uncompiled, which is slower: torch.compile fails here (No working C++" in caplog.text
    assert "more lines" not in caplog.text


@needs.compiler
@pytest.mark.parametrize("frozen", [False, True], ids=["latent", "frozen"])
def test_blocks_of_many_ranks_share_one_compilation(frozen):
    blocks = [
        BinaryLowRankLinear.from_factors(random_factors(24, 24, rank)) for rank in range(17, 29)
    ]
    for block in blocks if frozen else ():
        block.freeze()
    x = torch.randn(3, 24)
    expected = [block(x) for block in blocks]
    torch.compiler.reset()
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    with compiled(blocks):
        for block, output in zip(blocks, expected, strict=True):
            torch.testing.assert_close(block(x), output, rtol=1e-4, atol=1e-5)
    # the one that tries whether anything compiles, the first rank on its own, then a symbolic one; of packed signs
    # also one for a rank that fills its bytes, and one for a rank that equals another size
    assert stats["unique_graphs"] - before == (5 if frozen else 3)


def test_blocks_of_many_kinds_are_all_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    block = BinaryLowRankLinear.from_factors(random_factors(8, 8, 4))
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    with compiled([block]):
        for kind in range(10):  # two more than torch takes by itself
            block(torch.ones(*[1] * kind, 3, 8))
    assert frames["ok"] - before == 11  # and the one that tries whether anything compiles


@pytest.mark.parametrize(("threshold", "expected"), [(None, 0), (3, 0), (2, 1)], ids=str)
def test_only_long_training_compiles(threshold, expected, monkeypatch):
    entered = []
    monkeypatch.setattr(
        model_reconstruction,
        "compiled",
        lambda blocks, *methods: entered.append((blocks, methods)) or contextlib.nullcontext(),
    )
    model = student()
    config = ModelConfig(windows=4, batch=2, held_out=1, compile_from=threshold)
    teacher = tiny_llama().requires_grad_(False)
    ModelReconstructor(config)(model, teacher, WINDOWS, WINDOWS[:1])
    assert len(entered) == expected
    for blocks, methods in entered:
        assert blocks == [*model.model.layers, *teacher.model.layers]
        assert [name for _, name in methods] == ["piece"]


@needs.compiler
def test_a_compiled_objective_has_the_same_loss_and_gradients():
    teacher, model = tiny_llama().requires_grad_(False), student()
    objective = ModelObjective(model, teacher, [])
    found = []
    for context in (contextlib.nullcontext(), objective.compiled()):
        model.zero_grad()
        with context:
            assert ("piece" in vars(objective)) is bool(found)
            loss = objective((WINDOWS,))
            loss.backward()
        found.append((loss.item(), model.model.layers[0].mlp.up_proj.U.grad))
    (loss, gradient), (fast_loss, fast_gradient) = found
    assert fast_loss == pytest.approx(loss, rel=1e-5) and "piece" not in vars(objective)
    torch.testing.assert_close(fast_gradient, gradient, rtol=1e-3, atol=1e-6)
