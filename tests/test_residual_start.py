"""LoRA starts at the part of the packed weights' error that lowers the held-out loss most, and never above no start."""

import peft
import pytest
import torch
from packed_models import pack_randomly
from peft import LoraConfig, get_peft_model
from tiny_models import random_windows, tiny_gpt2, tiny_llama

from nanoquant.fine_tune_config import FineTuneConfig
from nanoquant.fine_tuning import fine_tune
from nanoquant.product_budget import ProductShape
from nanoquant.residual_start import (
    SHARES,
    directions,
    error_of,
    find_pairs,
    residual_start,
    sketch_errors,
)

WINDOWS = random_windows(4, 32)


def models(make=tiny_llama, size=8, rank=4, dtype=torch.float32):
    """A dense model, and a packed one with new LoRA."""
    torch.manual_seed(0)
    teacher = make(dtype=dtype)
    packed = make(dtype=dtype)
    packed.load_state_dict(teacher.state_dict())
    pack_randomly(packed, size, scale_dtype=dtype)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    return teacher, get_peft_model(packed.requires_grad_(False), lora).eval()


@torch.no_grad()
def distance(student, teacher):
    return (student(WINDOWS).logits - teacher(WINDOWS).logits).square().mean().item()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["linear", "Conv1D"])
@pytest.mark.parametrize("size", [8, ProductShape(4, (4,), 1)], ids=["signs", "look-ups"])
def test_a_rank_as_large_as_the_matrix_takes_back_the_whole_error(make, size, monkeypatch):
    monkeypatch.setattr("nanoquant.residual_start.SHARES", (0.5, 1.0))
    teacher, student = models(make, size, rank=256)
    losses = residual_start(student, teacher, WINDOWS, lambda: distance(student, teacher))
    assert losses[1.0] < 1e-6 < losses[0.5] < losses[0.0]
    assert distance(student, teacher) == losses[1.0]


def test_no_other_matrices_of_the_rank_leave_less_error_in_the_outputs():
    teacher, student = models(rank=4)
    pairs = find_pairs(student.get_base_model(), teacher)
    inputs = {}
    for i, pair in enumerate(pairs):
        pair.packed.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]}))
    with torch.no_grad():
        found = directions(pairs, sketch_errors(student, pairs, WINDOWS[:1]))
        for i, (pair, U) in enumerate(zip(pairs, found, strict=True)):
            E = inputs[i].flatten(0, -2) @ error_of(pair).T
            left = (E - E @ U @ U.T).norm()
            least = torch.linalg.svdvals(E)[4:].norm()
            assert least * 0.999 <= left <= least * 1.1


def test_a_start_that_helps_nothing_is_no_start():
    teacher, student = models()
    logits = student(WINDOWS).logits
    losses = iter(range(1 + len(SHARES)))
    residual_start(student, teacher, WINDOWS, lambda: float(next(losses)))
    assert student(WINDOWS).logits.equal(logits)
    trained = [p for n, p in student.named_parameters() if "lora_A" in n]
    assert all(p.abs().sum() > 0 for p in trained)  # so that the second matrices get gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fine_tuning_starts_there_with_a_teacher_alone(dtype):
    reports = {}
    for start in (None, "residual", "zero"):
        torch.manual_seed(0)
        teacher = tiny_llama(dtype=dtype)
        packed = tiny_llama(dtype=dtype)
        packed.load_state_dict(teacher.state_dict())
        pack_randomly(packed, 8, scale_dtype=dtype)
        config = FineTuneConfig(
            rank=24, windows=2, length=32, held_out=2, start=start, lora_lr=1e-9
        )
        tuned, reports[start] = fine_tune(packed, WINDOWS[:2], WINDOWS[2:], config, teacher)
        assert isinstance(tuned, peft.PeftModel)
    assert reports[None].held_out == reports["residual"].held_out
    assert reports[None].held_out[0] < 0.9 * reports["zero"].held_out[0]


def test_a_start_that_can_t_be_computed_is_refused():
    packed = pack_randomly(tiny_llama(), 8)
    config = FineTuneConfig(start="residual", rank=4, length=32)
    with pytest.raises(ValueError, match="needs the dense model as teacher"):
        fine_tune(packed, WINDOWS, WINDOWS, config)
    wider = tiny_llama(intermediate_size=160)
    with pytest.raises(ValueError, match="teacher has no linear .*mlp.*or start=zero"):
        fine_tune(packed, WINDOWS, WINDOWS, FineTuneConfig(rank=4, length=32), wider)
    assert not any("lora" in name for name, _ in packed.named_modules())  # nothing was begun
    with pytest.raises(ValueError, match="start must be residual or zero, got 'svd'"):
        FineTuneConfig(start="svd")
    with pytest.raises(ValueError, match="exclude each other"):
        FineTuneConfig(start="residual", train="scales")


def test_a_model_that_is_not_finite_is_named_as_without_a_start():
    packed = pack_randomly(tiny_llama(), 8)
    packed.model.layers[1].mlp.up_proj.s1.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj"):
        fine_tune(packed, WINDOWS, WINDOWS, FineTuneConfig(rank=4, length=32), tiny_llama())
