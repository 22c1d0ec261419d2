"""A teacher that recalls says what the teacher says, runs its blocks once a window, and trains the same student."""

import copy
import dataclasses

import pytest
import torch
from test_kept_logits import Tuples
from test_mapped import is_mapped
from test_model_reconstruction import HELD_OUT, SIGNS, TRAINING, teacher_and_student
from tiny_models import FAMILIES, VOCAB, random_windows, tiny_llama
from torch import nn

from nanoquant.activation_memory import ActivationMemory
from nanoquant.architectures import find_decoder
from nanoquant.model_reconstruction import ModelReconstructor
from nanoquant.recall import Recall, recalling

WINDOWS = random_windows(5, 16)
SINGLE = dataclasses.replace(SIGNS, batch=1, compile_from=None)


def recall_of(model, windows=5, memory=None):
    return Recall(model, find_decoder(model).blocks, windows, memory)


def count_runs(block):
    runs = []
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def blocks_run(config):
    """Windows that the teacher's first block saw in a training, and the student's losses."""
    teacher, student = teacher_and_student()
    seen = []
    inner = teacher.model.layers[0].self_attn
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    report = ModelReconstructor(config)(student, teacher, TRAINING, HELD_OUT)
    return sum(seen), report


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_teacher_says_the_first_time_and_later(family):
    model = FAMILIES[family]().eval()
    recall = recall_of(model)
    with torch.no_grad():
        expected = [model(input_ids=window, use_cache=False).logits for window in WINDOWS.split(1)]
    for _ in range(2):
        for window, logits in zip(WINDOWS.split(1), expected, strict=True):
            assert torch.equal(recall(input_ids=window).logits, logits)
    torch.testing.assert_close(
        recall(input_ids=WINDOWS).logits, torch.cat(expected), rtol=1e-5, atol=1e-5
    )
    assert not any("forward" in vars(block) for block in find_decoder(model).blocks)


@pytest.mark.parametrize("more", [(), (None,)])
def test_blocks_that_return_tuples_are_recalled(more):
    model = Tuples(more)
    recall = recall_of(model)
    for _ in range(2):
        torch.testing.assert_close(recall(WINDOWS).logits, model(WINDOWS).logits)


def test_blocks_run_once_a_window_and_beyond_the_expected_ones_every_time():
    model = tiny_llama().eval()
    recall = recall_of(model, windows=3)
    runs = count_runs(model.model.layers[0].self_attn)
    for _ in range(3):
        recall(input_ids=WINDOWS[:4])
    assert len(runs) == 3 + 3  # three windows once, one three times


def test_windows_of_another_length_are_kept_beside():
    model = tiny_llama().eval()
    recall, short = recall_of(model), WINDOWS[:, :7]
    for _ in range(2):
        for windows in (WINDOWS[:2], short[:2]):
            torch.testing.assert_close(
                recall(input_ids=windows).logits, model(input_ids=windows).logits
            )
    assert {t: states.shape[1] for t, states in recall.kept.items()} == {16: 16, 7: 7}


def test_states_lie_where_activations_may(tmp_path):
    model = tiny_llama().eval()
    recall = recall_of(model, memory=ActivationMemory("1KB", tmp_path))
    for _ in range(2):
        torch.testing.assert_close(
            recall(input_ids=WINDOWS).logits, model(input_ids=WINDOWS).logits
        )
    assert is_mapped(recall.kept[16])


def test_epochs_after_the_first_ask_no_block_and_train_the_same():
    without = dataclasses.replace(SINGLE, keep_states=False)
    ran, report = blocks_run(SINGLE)
    every, plain = blocks_run(without)
    assert ran == len(TRAINING) + len(HELD_OUT)
    assert every == SINGLE.epochs * len(TRAINING) + len(HELD_OUT) * (1 + SINGLE.evaluations)
    assert report.losses == plain.losses
    assert report.held_out == plain.held_out


def test_a_single_epoch_keeps_nothing(monkeypatch):
    once = dataclasses.replace(SINGLE, epochs=1)
    monkeypatch.setattr("nanoquant.model_reconstruction.recalling", pytest.fail)
    teacher, student = teacher_and_student()
    ModelReconstructor(once)(student, teacher, TRAINING, HELD_OUT)


def test_batches_of_several_windows_train_alike():
    teacher, student = teacher_and_student()
    other = copy.deepcopy(student)
    without = dataclasses.replace(SIGNS, keep_states=False)
    losses = ModelReconstructor(SIGNS)(student, teacher, TRAINING, HELD_OUT).losses
    plain = ModelReconstructor(without)(other, teacher, TRAINING, HELD_OUT).losses
    assert losses == pytest.approx(plain, rel=1e-3)


def test_a_teacher_without_one_list_of_blocks_stays_as_it_is():
    student = nn.Sequential(nn.Linear(4, VOCAB))
    teacher = copy.deepcopy(student)
    assert recalling(teacher, student, 3) is teacher
