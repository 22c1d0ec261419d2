"""What is changed of a model for a while is as before afterwards, and nothing that left it meanwhile is kept."""

import weakref

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from nanoquant.decoder import evaluation_mode, replaced_forwards


@pytest.mark.parametrize("fails", [False, True])
def test_forwards_are_replaced_for_a_while_one_inside_the_other(fails):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = [m(x) for m in (one, two)]
    try:
        with replaced_forwards([(one, lambda x: 2 * x), (two, lambda x: 3 * x)]):
            with replaced_forwards((m, lambda x: 5 * x) for m in (one,)):
                assert torch.equal(one(x), 5 * x) and torch.equal(two(x), 3 * x)
            assert torch.equal(one(x), 2 * x)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(m(x), y) for m, y in zip((one, two), expected, strict=True))
    assert "forward" not in vars(one) and "forward" not in vars(two)


def test_evaluation_mode_keeps_no_module_alive_that_was_replaced():
    model = tiny_llama().train()
    block = model.model.layers[0]
    gone, weight = weakref.ref(block.mlp.up_proj), weakref.ref(block.mlp.up_proj.weight)
    block.mlp.down_proj.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        block.mlp.up_proj = nn.Linear(64, 96, bias=False).eval()
        assert gone() is None and weight() is None
    assert block.training and not block.mlp.down_proj.training and not block.mlp.up_proj.training
