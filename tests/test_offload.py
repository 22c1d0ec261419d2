"""Blocks that visit the device that computes; here that is the CPU, where visitors are copies."""

import copy

import pytest
import torch
from tiny_models import VOCAB, tiny_llama

from nanoquant import offload as module
from nanoquant.architectures import find_decoder
from nanoquant.config import nanoquant_config
from nanoquant.offload import at_work, offload, settle, visits
from nanoquant.quantize import quantize

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


def train(linear):
    """A step of a fused optimizer, which tells nobody that it has written."""
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.SGD([linear.weight], lr=1.0, fused=True).step()


def replace(linear):
    linear.weight.data = linear.weight.data.double().sub(1).float()


@pytest.mark.parametrize("change", [train, replace])
def test_what_changes_on_a_visit_comes_home_where_that_is_asked_for(blocks, change):
    linear = blocks[0].mlp.up_proj
    home, before = linear.weight, linear.weight.detach().clone()
    with at_work(blocks[0]):
        change(linear)
    assert linear.weight is home and torch.equal(home, before)
    with at_work(blocks[0], changes=True):
        change(linear)
    assert linear.weight is home and torch.allclose(home, before - 1, atol=1e-6)


def test_new_parts_of_a_block_stay_in_it(blocks):
    new = torch.nn.Linear(64, 96, bias=False)
    with at_work(blocks[0]):
        blocks[0].mlp.up_proj = new
    assert blocks[0].mlp.up_proj is new


def test_blocks_whose_forward_is_not_their_own_are_refused(model, blocks):
    with pytest.raises(ValueError, match="block 0 has a forward of its own.* or visits already"):
        offload(model, blocks, CPU)


def test_an_error_on_arrival_leaves_every_tensor_as_it_was(model, blocks, monkeypatch):
    home, count = list(model.parameters()), iter(range(100))
    like = module._like

    def full(tensor, values):
        if next(count) == 3:
            raise RuntimeError("out of memory")
        return like(tensor, values)

    monkeypatch.setattr(module, "_like", full)
    with pytest.raises(RuntimeError, match="out of memory"), at_work(blocks[0]):
        pass
    assert all(a is b for a, b in zip(model.parameters(), home, strict=True))


def test_a_setting_that_nobody_has_carried_out_is_refused():
    config = nanoquant_config(2.0, run={"offload": True}, calibration={"length": 8})
    with pytest.raises(ValueError, match=r"run\.offload is for the command, and no block"):
        quantize(tiny_llama(), torch.zeros(9000, dtype=torch.long), config)


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
