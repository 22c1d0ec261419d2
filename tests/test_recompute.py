"""Blocks that run again in the backward pass keep almost nothing."""

import copy
import dataclasses
import functools

import pytest
import torch
from test_model_reconstruction import HELD_OUT, SCALES, SIGNS, TRAINING, teacher_and_student
from tiny_models import random_windows, tiny_llama

from nanoquant.architectures import find_decoder
from nanoquant.model_reconstruction import ModelReconstructor
from nanoquant.recompute import recomputed


def test_between_the_passes_only_hidden_states_are_kept():
    model, ids = tiny_llama().eval(), random_windows(2, 64)
    decoder = find_decoder(model)
    start = lambda _, args, output: output.requires_grad_()  # noqa: E731
    model.requires_grad_(False).get_input_embeddings().register_forward_hook(start)

    def kept():
        """Bytes that autograd keeps of a forward pass through the blocks, each tensor once."""
        found = {}

        def note(tensor):
            found[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.model(input_ids=ids, use_cache=False)
        return sum(found.values())

    everything = kept()
    with recomputed(decoder.blocks):
        little = kept()
    assert little < everything / 4


def test_a_pass_without_gradients_is_an_ordinary_one():
    model, ids = tiny_llama().eval(), random_windows(2, 8)
    expected = model(ids).logits
    with torch.no_grad(), recomputed(find_decoder(model).blocks):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("compiles", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("config", [SCALES, SIGNS], ids=["scales", "signs"])
def test_a_student_trains_the_same(config, compiles, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    teacher, student = teacher_and_student()
    other = copy.deepcopy(student)
    config = dataclasses.replace(config, compile_from=1 if compiles else None)
    again = dataclasses.replace(config, recompute=True)
    plain = ModelReconstructor(config)(student, teacher, TRAINING, HELD_OUT)
    report = ModelReconstructor(again)(other, teacher, TRAINING, HELD_OUT)
    assert report == plain
    state = other.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())
