"""A teacher that recalls says what the teacher says, runs its blocks once a window, and trains the same student."""

import copy
import dataclasses
import gc

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


def quantized_linear():
    """A quantized layer."""
    _, student = teacher_and_student()
    return student.model.layers[0].self_attn.q_proj


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


def test_blocks_run_once_a_window_and_every_time_beyond_the_expected_ones():
    model = tiny_llama().eval()
    recall = recall_of(model, windows=3)
    runs = count_runs(model.model.layers[0].self_attn)
    for _ in range(3):
        for window in WINDOWS[:4].split(1):
            recall(input_ids=window)
    assert len(runs) == 3 + 3  # three windows once, one three times


def test_a_batch_with_a_new_window_runs_whole_and_keeps_it():
    model = tiny_llama().eval()
    recall = recall_of(model)
    runs = count_runs(model.model.layers[0].self_attn)
    for chosen, count in (([0, 1], 1), ([1, 0], 1), ([1, 2], 2), ([2, 0], 2)):
        torch.testing.assert_close(
            recall(input_ids=WINDOWS[chosen]).logits, model(input_ids=WINDOWS[chosen]).logits
        )
        assert len(runs) - 1 == count
        runs.pop()  # the model itself ran


def test_windows_of_another_length_are_answered_and_not_kept():
    model = tiny_llama().eval()
    recall, short = recall_of(model), WINDOWS[:, :7]
    for _ in range(2):
        for windows in (WINDOWS[:2], short[:2]):
            torch.testing.assert_close(
                recall(input_ids=windows).logits, model(input_ids=windows).logits
            )
    assert len(recall.rows) == 2 and recall.kept.shape[:2] == (5, 16)


def test_states_lie_where_activations_may(tmp_path):
    model = tiny_llama().eval()
    recall = recall_of(model, memory=ActivationMemory("1KB", tmp_path))
    for _ in range(2):
        torch.testing.assert_close(
            recall(input_ids=WINDOWS).logits, model(input_ids=WINDOWS).logits
        )
    assert is_mapped(recall.kept)


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


def test_of_several_processes_none_keeps_anything(monkeypatch):
    monkeypatch.setattr("nanoquant.model_reconstruction.world_size", lambda: 2)
    monkeypatch.setattr("nanoquant.model_reconstruction.recalling", pytest.fail)
    teacher, student = teacher_and_student()
    ModelReconstructor(SINGLE)(student, teacher, TRAINING, HELD_OUT)


def test_batches_of_several_windows_train_alike():
    kept = dataclasses.replace(SIGNS, compile_from=None)
    ran, report = blocks_run(kept)
    every, plain = blocks_run(dataclasses.replace(kept, keep_states=False))
    assert len(TRAINING) + len(HELD_OUT) <= ran < every
    assert report.losses == pytest.approx(plain.losses, rel=1e-5)


def test_the_first_blocks_alone_may_be_quantized():
    teacher, student = teacher_and_student()
    dense = copy.deepcopy(teacher.model.layers[1])
    student.model.layers[1] = dense
    recall = recalling(teacher, student, 4)
    assert list(recall.blocks) == list(teacher.model.layers)
    twice = [recall(input_ids=HELD_OUT).logits for _ in range(2)]
    torch.testing.assert_close(*twice)


def test_experts_in_lists_inside_the_blocks_are_no_second_list():
    student = tiny_llama()
    for layer in student.model.layers:
        layer.mlp = nn.ModuleList(
            [nn.Sequential(quantized_linear()), nn.Sequential(quantized_linear())]
        )
    teacher = copy.deepcopy(student)
    assert list(recalling(teacher, student, 4).blocks) == list(teacher.model.layers)
    student.more = nn.ModuleList([quantized_linear()])
    assert recalling(teacher, student, 4) is teacher


def test_under_autocast_it_says_what_the_teacher_says():
    model = tiny_llama(dtype=torch.bfloat16).eval()
    recall = recall_of(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(input_ids=WINDOWS).logits
        for _ in range(2):
            assert torch.equal(recall(input_ids=WINDOWS).logits, expected)
    assert recall.kept.dtype == torch.bfloat16


def test_what_was_kept_is_freed_with_the_training():
    memory = ActivationMemory()
    teacher, student = teacher_and_student()
    ModelReconstructor(SINGLE)(student, teacher, TRAINING, HELD_OUT, memory=memory)
    gc.collect()
    assert memory.used == 0


def test_a_teacher_without_one_list_of_blocks_stays_as_it_is():
    student = nn.Sequential(nn.Linear(4, VOCAB))
    teacher = copy.deepcopy(student)
    assert recalling(teacher, student, 3) is teacher
