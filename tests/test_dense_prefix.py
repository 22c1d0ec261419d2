"""Passes that begin at a block, after one whole pass of the dense model."""

import pytest
import torch
from tiny_models import FAMILIES, random_windows

from nanoquant.architectures import find_decoder
from nanoquant.dense_prefix import DensePrefix

WINDOWS = random_windows(2, 16)


def logits(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_begins_at_a_block_gives_the_logits_of_the_whole_pass(family):
    model = FAMILIES[family]()
    decoder = find_decoder(model)
    dense = DensePrefix(model, decoder, WINDOWS)
    assert torch.equal(dense.logits, logits(model))
    for b, block in enumerate(decoder.blocks):
        linear = block.get_submodule(decoder.linears[b][-1])
        kept = linear.weight.data
        linear.weight.data = 0.5 * kept
        assert torch.equal(dense.logits_from(b), logits(model))
        linear.weight.data = kept
        assert torch.equal(dense.logits_from(b), dense.logits)
    assert not any("forward" in vars(block) for block in decoder.blocks)
