"""Blocks that visit the device that computes; here that is the CPU, where visitors are copies."""

import copy

import pytest
import torch
from tiny_models import VOCAB, tiny_llama

from nanoquant.architectures import find_decoder
from nanoquant.offload import at_work, offload, settle, visits

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return tiny_llama(layers=2)


@pytest.fixture
def blocks(model):
    found = find_decoder(model).blocks
    offload(model, found, CPU)
    return found


def logits(model):
    ids = torch.arange(12).remainder(VOCAB)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_a_model_computes_the_same_and_its_parameters_are_the_same_objects_afterwards(model):
    before = logits(model), list(model.parameters())
    offload(model, find_decoder(model).blocks, CPU)
    assert torch.equal(logits(model), before[0])
    assert all(a is b for a, b in zip(model.parameters(), before[1], strict=True))


def test_a_block_at_work_is_a_copy_until_its_last_visit_ends(blocks):
    home = blocks[0].mlp.up_proj.weight
    with at_work(blocks[0]):
        away = blocks[0].mlp.up_proj.weight
        assert away is not home and away.data_ptr() != home.data_ptr() and torch.equal(away, home)
        with at_work(blocks[0]):
            assert blocks[0].mlp.up_proj.weight is away
        assert blocks[0].mlp.up_proj.weight is away
    assert blocks[0].mlp.up_proj.weight is home


@pytest.mark.parametrize("change", ["written", "replaced", "new module"])
def test_what_changes_on_a_visit_comes_home(blocks, change):
    linear = blocks[0].mlp.up_proj
    home = linear.weight
    with at_work(blocks[0]), torch.no_grad():
        if change == "written":
            linear.weight.mul_(2)
        elif change == "replaced":
            linear.weight.data = linear.weight.data * 2
        else:
            blocks[0].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
            blocks[0].mlp.up_proj.weight.copy_(2 * home)
    assert torch.equal(blocks[0].mlp.up_proj.weight, 2 * home)


def test_a_visit_ends_with_an_error_too(model, blocks):
    home = list(model.parameters())
    with pytest.raises(RuntimeError):
        blocks[0](torch.zeros(1, 3, 5))
    assert all(a is b for a, b in zip(model.parameters(), home, strict=True))


def test_gradients_reach_the_input_of_a_block_that_is_kept_at_work(blocks):
    hidden = torch.randn(1, 4, 64, requires_grad=True)
    with at_work(blocks[0]):
        blocks[0].mlp(hidden).sum().backward()
    assert hidden.grad.abs().sum() > 0


def test_a_copy_of_the_model_visits_with_its_own_blocks(model, blocks):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in find_decoder(twin).blocks.parameters():
            parameter.zero_()
    assert not torch.equal(logits(twin), logits(model))
    assert visits(find_decoder(twin).blocks[0])


def test_settled_blocks_stay(model, blocks):
    expected = logits(model)
    settle(model)
    assert not any(visits(block) for block in blocks)
    assert torch.equal(logits(model), expected)
    weight = blocks[0].mlp.up_proj.weight
    with at_work(blocks[0]):
        assert blocks[0].mlp.up_proj.weight is weight
