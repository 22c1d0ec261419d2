"""The whole-model phase follows the teacher, changes only what it says, and never makes it worse."""

import copy
import dataclasses
import itertools
import logging

import pytest
import torch
from tiny_models import random_windows, tiny_gpt2, tiny_llama

from nanoquant import model_reconstruction
from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.architectures import as_linear, find_decoder
from nanoquant.binary import sign
from nanoquant.divergence import logits_divergence
from nanoquant.importance import Importance
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_reconstruction import (
    ModelConfig,
    ModelObjective,
    ModelReconstructor,
    norm_parameters,
)
from nanoquant.optimizer import OptimizerConfig
from nanoquant.student import prepared

SIGNS = ModelConfig(
    train="signs", windows=24, epochs=3, batch=4, latent_lr=2e-2, scale_lr=1e-2, held_out=4,
    evaluations=2, optimizer=OptimizerConfig(beta2=0.95, clip_norm=1.0),
)  # fmt: skip
SCALES = dataclasses.replace(SIGNS, train="scales")
TRAINING, HELD_OUT = random_windows(24, 16), random_windows(4, 16, seed=9)


def teacher_and_student(build=tiny_llama, rank=16):
    """A tiny model, and the same one with initialized binary layers, in the latent state."""
    teacher = build().requires_grad_(False)
    student = copy.deepcopy(teacher)
    solver = ADMMInitializer(ADMMConfig(iterations=20))
    for name, module in find_decoder(student).linear_modules().items():
        linear = as_linear(module)
        d_out, d_in = linear.weight.shape
        uniform = Importance(input=torch.ones(d_in), output=torch.ones(d_out))
        layer = BinaryLowRankLinear.from_factors(solver(linear.weight, uniform, rank), linear.bias)
        student.set_submodule(name, layer)
    return teacher, student


def reconstruct(config, build=tiny_llama, **kwargs):
    teacher, student = teacher_and_student(build)
    start = frozen_copy(student)
    report = ModelReconstructor(config)(student, teacher, TRAINING, HELD_OUT, **kwargs)
    return teacher, start, student, report


def frozen_copy(student):
    student = copy.deepcopy(student)
    for layer in layers_of(student).values():
        layer.freeze()
    return student


@torch.no_grad()
def held_out_divergence(student, teacher):
    return float(sum(logits_divergence(student, teacher, [w]) for w in HELD_OUT.split(1)) / 4)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, BinaryLowRankLinear)}


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return {key for key in a if torch.equal(a[key], b[key])}


def test_divergence_of_a_model_from_itself_is_zero():
    teacher, _ = teacher_and_student()
    assert abs(float(logits_divergence(teacher, teacher, [HELD_OUT]))) < 1e-6


def test_training_signs_lowers_held_out_divergence():
    teacher, start, student, report = reconstruct(SIGNS)
    before, after = held_out_divergence(start, teacher), held_out_divergence(student, teacher)
    assert after < 0.8 * before
    assert report.held_out[0] == pytest.approx(before, rel=1e-4)
    assert report.held_out[report.best_step] == pytest.approx(after, rel=1e-4)
    assert len(report.losses) == 18 and report.losses[-1] < report.losses[0]


@torch.no_grad()
def own_loss(student):
    logits = student(TRAINING).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), TRAINING[:, 1:].flatten()))


def test_hard_labels_teach_the_text_itself_and_held_out_windows_are_measured_without_them():
    teacher, _, plain, _ = reconstruct(SIGNS)
    _, start, student, report = reconstruct(dataclasses.replace(SIGNS, hard_labels=0.5))
    assert own_loss(student) < min(own_loss(plain), own_loss(start))
    after = held_out_divergence(student, teacher)
    assert report.held_out[report.best_step] == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_of_hard_labels_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="hard_labels is a share, at least 0 and below 1, got"):
        ModelConfig(hard_labels=share)


def test_training_signs_changes_signs_scales_and_norms_and_nothing_else():
    _, start, student, _ = reconstruct(SIGNS)
    changed = start.state_dict().keys() - same_state(start, student)
    kinds = {name.rpartition(".")[2] if "proj" in name else "norm" for name in changed}
    assert kinds == {"u_signs", "v_signs", "s1", "s2", "norm"}
    assert all("proj" in name or "norm" in name for name in changed)


def test_training_scales_keeps_signs_bitwise_and_lowers_the_divergence():
    teacher, start, student, _ = reconstruct(SCALES)
    changed = start.state_dict().keys() - same_state(start, student)
    assert {name.rpartition(".")[2] for name in changed} == {"s1", "s2"}
    assert held_out_divergence(student, teacher) < held_out_divergence(start, teacher)


@pytest.mark.parametrize("config", [SCALES, SIGNS], ids=["scales", "signs"])
def test_harmful_training_leaves_the_student_as_it_was(config, monkeypatch):
    values = iter([0.5, 0.6, 0.7])
    monkeypatch.setattr(model_reconstruction, "held_out_divergence", lambda *_: next(values))
    _, start, student, report = reconstruct(config)
    assert report.held_out == {0: 0.5, 9: 0.6, 18: 0.7} and report.best_step == 0
    assert same_state(start, student) == start.state_dict().keys()


@pytest.mark.parametrize("config", [SCALES, SIGNS], ids=["scales", "signs"])
def test_the_student_ends_frozen_and_the_teacher_is_untouched(config):
    teacher, _, student, _ = reconstruct(config)
    assert all(layer.frozen for layer in layers_of(student).values())
    assert not any(p.requires_grad for p in student.parameters())
    assert same_state(teacher, tiny_llama()) == teacher.state_dict().keys()
    assert all(p.grad is None for p in teacher.parameters())


def test_held_out_divergence_is_measured_at_the_start_in_between_and_at_the_end():
    _, _, _, report = reconstruct(dataclasses.replace(SIGNS, evaluations=3))
    assert sorted(report.held_out) == [0, 6, 12, 18]


def test_training_that_breaks_down_keeps_the_best_state_so_far(monkeypatch, caplog):
    steps = itertools.count()
    forward = ModelObjective.forward

    def breaking(objective, batch):
        return forward(objective, batch) * (float("nan") if next(steps) > 12 else 1)

    monkeypatch.setattr(ModelObjective, "forward", breaking)
    teacher, start, student, report = reconstruct(dataclasses.replace(SIGNS, evaluations=3))
    assert report.best_step in (6, 12) and "training ends here" in caplog.text
    assert report.undone == 4
    assert held_out_divergence(student, teacher) < held_out_divergence(start, teacher)
    assert all(layer.frozen for layer in layers_of(student).values())


def test_a_warm_up_of_most_steps_is_told(caplog):
    caplog.set_level(logging.INFO)
    reconstruct(SIGNS)
    assert "warm-up" not in caplog.text
    reconstruct(dataclasses.replace(SIGNS, optimizer=OptimizerConfig(warmup=20)))
    assert "warm-up takes 18 of 18 steps" in caplog.text


def test_a_look_that_falls_on_an_undone_step_is_taken_at_the_next(monkeypatch):
    steps = itertools.count()
    forward = ModelObjective.forward

    def breaking(objective, batch):
        return forward(objective, batch) * (float("nan") if next(steps) == 9 else 1)

    monkeypatch.setattr(ModelObjective, "forward", breaking)
    *_, report = reconstruct(SIGNS)
    assert report.undone == 1 and sorted(report.held_out) == [0, 10, 18]


def test_a_bfloat16_student_used_alone_keeps_its_dtypes_and_runs():
    teacher, _, student, _ = reconstruct(
        SIGNS, lambda: tiny_llama(dtype=torch.bfloat16), precision="bf16-mixed"
    )
    norms = norm_parameters(student)
    assert norms and {norm.dtype for norm in norms} == {torch.bfloat16}
    assert student(input_ids=HELD_OUT).logits.isfinite().all()


def test_a_student_that_overflows_before_training_names_the_layer():
    teacher, student = teacher_and_student()
    student.model.layers[1].mlp.down_proj.s1.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"first in student\.model\.layers\.1\.mlp\.down"):
        ModelReconstructor(SIGNS)(student, teacher, TRAINING, HELD_OUT)


def test_none_skips_the_phase():
    _, start, student, report = reconstruct(dataclasses.replace(SIGNS, train="none"))
    assert not report.losses and not report.held_out
    assert same_state(start, frozen_copy(student)) == start.state_dict().keys()


@pytest.mark.parametrize("idle", [("kept_logits", 8), ("hard_labels", 0.3), ("recompute", True)])
def test_what_would_be_of_no_use_without_the_phase_is_refused(idle):
    with pytest.raises(ValueError, match=f"{idle[0]}=.* and train=none exclude each"):
        ModelConfig(train="none", **dict([idle]))


def test_a_student_without_quantized_layers_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="no quantized layer"):
        ModelReconstructor(SIGNS)(model, model, TRAINING, HELD_OUT)


def test_gpt2_trains_biases_and_layer_norms_too():
    teacher, start, student, _ = reconstruct(SIGNS, tiny_gpt2)
    changed = start.state_dict().keys() - same_state(start, student)
    assert "transformer.h.0.mlp.c_proj.bias" in changed and "transformer.ln_f.weight" in changed
    assert "transformer.wte.weight" not in changed
    assert held_out_divergence(student, teacher) < held_out_divergence(start, teacher)


def test_a_frozen_student_can_be_trained_again():
    teacher, student = teacher_and_student()
    student = frozen_copy(student)
    before = held_out_divergence(student, teacher)
    report = ModelReconstructor(SIGNS)(student, teacher, TRAINING, HELD_OUT)
    assert report.held_out[report.best_step] < before
    assert all(layer.frozen for layer in layers_of(student).values())


def test_tied_embeddings_stay_tied():
    _, _, student, _ = reconstruct(SIGNS)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_norm_parameters_are_found_by_class_and_hold_no_matrices():
    _, model = teacher_and_student()
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)] for p in norm_parameters(model)}
    assert found == {n for n in names.values() if "norm" in n} and len(found) == 5
    assert norm_parameters(tiny_llama()) == []  # blocks without binary layers keep theirs


def test_latents_start_at_mean_magnitude_one_with_the_signs_of_the_layer():
    _, student = teacher_and_student()
    layers = layers_of(student)
    before = {name: sign(layer.U.detach()) for name, layer in layers.items()}
    groups = ModelReconstructor(SIGNS).parameter_groups(prepared(student, "signs"))
    for name, layer in layers.items():
        assert torch.equal(sign(layer.U.detach()), before[name])
        assert float(layer.U.detach().abs().mean()) == pytest.approx(1)
    assert sum(group["lr"] == SIGNS.latent_lr for group in groups) == 1


def test_relative_rates_are_shares_of_the_mean_scale():
    _, student = teacher_and_student()
    layer = next(iter(layers_of(student).values()))
    groups = ModelReconstructor(SCALES).parameter_groups(student)
    assert groups[0]["lr"] == pytest.approx(SCALES.scale_lr * float(layer.s1.detach().abs().mean()))
    absolute = dataclasses.replace(SCALES, relative_rates=False)
    groups = ModelReconstructor(absolute).parameter_groups(student)
    assert {group["lr"] for group in groups} == {SCALES.scale_lr}


def test_every_step_is_reported():
    seen = []
    report = reconstruct(SCALES, on_step=lambda step, loss: seen.append((step, loss)))[3]
    assert [step for step, _ in seen] == list(range(18))
    assert [loss for _, loss in seen] == report.losses


def test_the_same_seed_gives_the_same_student():
    students = [reconstruct(dataclasses.replace(SIGNS, epochs=1))[2] for _ in range(2)]
    assert same_state(*students) == students[0].state_dict().keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "all"},
        {"windows": 0},
        {"epochs": 0},
        {"batch": 0},
        {"held_out": 0},
        {"evaluations": 0},
        {"latent_lr": 0.0},
        {"scale_lr": -1.0},
        {"latent_lr": float("inf")},
        {"compile_from": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ModelConfig(**changes)
