"""The teacher shares the student's weights as long as they are the same, and never changes."""

import copy
import dataclasses
import importlib

import pytest
import torch
from tiny_models import FAMILIES, random_windows

from nanoquant.admm import ADMMConfig
from nanoquant.block_config import BlockConfig
from nanoquant.budget import BudgetConfig
from nanoquant.config import CalibrationConfig, NanoQuantConfig
from nanoquant.embedding import EmbeddingConfig
from nanoquant.importance import ImportanceConfig
from nanoquant.model_config import ModelConfig
from nanoquant.sensitivity import SensitivityConfig
from nanoquant.twin import twin

steps = importlib.import_module(
    "nanoquant.quantize"
)  # the package has its function under that name
ROUNDED = ("llama", "gpt2", "gemma3")
EVERYTHING = NanoQuantConfig(
    budget=BudgetConfig(bits=1.2, rank_multiple=8, allocation="measured"),
    calibration=CalibrationConfig(windows=4, length=16),
    importance=ImportanceConfig(curvature="both"),
    sensitivity=SensitivityConfig(iterations=2),
    admm=ADMMConfig(iterations=2),
    block=BlockConfig(
        schedule="algorithm1",
        windows=4,
        dense_epochs=1,
        dense_lr=1e-2,
        refine_epochs=1,
        joint_epochs=1,
        latent_lr=1e-2,
        scale_lr=1e-2,
    ),
    model=ModelConfig(windows=8, held_out=2, compile_from=None),
    embedding=EmbeddingConfig(bits=8),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_has_equal_values_in_the_same_memory_and_parameters_of_its_own(family):
    model = FAMILIES[family]()
    other = twin(model)
    pairs = list(zip(model.named_parameters(), other.named_parameters(), strict=True))
    for (name, p), (same, q) in pairs:
        assert name == same and p is not q and p.data_ptr() == q.data_ptr()
        q.data = q.data + 1
    assert len({id(q) for _, (_, q) in pairs}) == len({id(p) for (_, p), _ in pairs})
    ids = random_windows(2, 8)
    assert not torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), *((f, torch.bfloat16) for f in ROUNDED)],
)
def test_no_phase_writes_into_the_teacher(family, dtype, monkeypatch):
    model = FAMILIES[family]().to(dtype)
    before, seen = copy.deepcopy(model), []
    inner = steps.reconstruct_model

    def spy(student, teacher, *args):
        seen.append(teacher)
        return inner(student, teacher, *args)

    monkeypatch.setattr(steps, "reconstruct_model", spy)
    report = steps.quantize(model, random_windows(16, 16).flatten(), EVERYTHING)
    for (name, p), q in zip(before.named_parameters(), seen[0].parameters(), strict=True):
        assert torch.equal(p, q), name
    assert report.model.losses


def test_the_teacher_takes_no_memory_of_its_own_before_the_student_changes(monkeypatch):
    model, seen = FAMILIES["llama"](), []

    def look(student, teacher, *_):
        seen.extend(q.data_ptr() for q in teacher.parameters())
        raise KeyboardInterrupt

    before = {p.data_ptr() for p in model.parameters()}
    monkeypatch.setattr(steps, "reconstruct_model", look)
    config = dataclasses.replace(EVERYTHING, block=BlockConfig(dense_epochs=0, refine_epochs=0))
    with pytest.raises(KeyboardInterrupt):
        steps.quantize(model, random_windows(16, 16).flatten(), config)
    assert before == set(seen)
