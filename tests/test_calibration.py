"""Calibration one block at a time gives what one pass of the whole model gives, and holds one block's statistics."""

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_gemma3, tiny_llama

from nanoquant.architectures import find_decoder
from nanoquant.calibration import BlockwiseCalibration, collect_importances, passes
from nanoquant.importance import (
    ImportanceCollector,
    ImportanceConfig,
    cross_entropy_gradient,
)
from nanoquant.segments import Segments

DIAGONAL, BOTH = ImportanceConfig(), ImportanceConfig(curvature="both")


def whole_model(model, windows, config, batch):
    """The plain twin: one forward and backward pass of the whole model a batch."""
    linears = find_decoder(model).linear_modules()
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    start = embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())
    with ImportanceCollector(linears, config) as collector:
        for ids in windows.split(batch):
            logits = model(input_ids=ids, use_cache=False).logits
            logits.backward(cross_entropy_gradient(logits.detach(), ids))
    start.remove()
    return collector.importances(release=True)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, known in expected.items():
        other = found[name]
        assert other.scale == known.scale, name
        assert torch.equal(other.input, known.input), name
        assert torch.equal(other.output, known.output), name
        for part in ("input_correlation", "output_correlation"):
            one, two = getattr(other, part), getattr(known, part)
            assert (one is None) == (two is None), name
            assert one is None or all(map(torch.equal, one, two)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [DIAGONAL, BOTH], ids=["diagonal", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_importances_equal_those_of_the_whole_model(family, config, dtype):
    model, windows = FAMILIES[family](dtype=dtype), random_windows(5, 16)
    expected = whole_model(model, windows, config, batch=2)
    assert_same(collect_importances(model, find_decoder(model), windows, config, 2), expected)


def test_blocks_that_are_called_with_the_text_are_calibrated_too():
    model, windows = tiny_llama(layers=3), random_windows(4, 16)
    inner, layers = model.model.forward, model.model.layers

    def with_text(input_ids, **kwargs):
        return inner(input_ids=input_ids, per_layer=input_ids.float()[..., None] / 128, **kwargs)

    def reading(forward):
        return lambda hidden, per_layer=0, **kwargs: forward(hidden, **kwargs) + per_layer

    model.model.forward = with_text
    for layer in layers:
        layer.forward = reading(layer.forward)
    own = [layer.forward for layer in layers]
    expected = whole_model(model, windows, DIAGONAL, batch=2)
    assert_same(collect_importances(model, find_decoder(model), windows, DIAGONAL, 2), expected)
    assert [layer.forward for layer in layers] == own


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_lead_to_the_logits_of_the_model(family):
    model, ids = FAMILIES[family](), random_windows(2, 24)
    decoder = find_decoder(model)
    segments = Segments(model, decoder)
    with torch.no_grad():
        expected, hidden = model(input_ids=ids, use_cache=False).logits, segments.enter(ids)
        for b in range(len(decoder.blocks)):
            hidden = segments(b, ids, hidden)
    assert torch.equal(hidden, expected)
    assert not any("forward" in vars(block) for block in decoder.blocks)


def test_chosen_blocks_alone_are_observed_and_handed_over_from_the_last_to_the_first():
    model, windows = tiny_gemma3(layers=5), random_windows(4, 16)
    decoder, kept, done = find_decoder(model), [], []
    expected = whole_model(model, windows, DIAGONAL, batch=2)
    calibration = BlockwiseCalibration(model, decoder, windows, DIAGONAL, 2)
    calibration(range(1, 3), lambda *found: kept.append(found), done.append)
    assert [b for b, _ in kept] == [4, 3, 2, 1]
    assert [len(known) for _, known in kept] == [0, 0, 7, 7]
    for _, known in kept[2:]:
        assert_same(known, {name: expected[name] for name in known})
    assert sum(done) == passes(5, 1) == 4 + 2 * 4


def test_a_calibration_goes_on_at_any_block():
    model, windows = tiny_llama(layers=4), random_windows(4, 16)
    decoder, whole, gradients = find_decoder(model), {}, {}
    calibration = BlockwiseCalibration(model, decoder, windows, BOTH, 2)

    def keep(b, found):
        whole[b], gradients[b] = found, calibration.gradient.clone()

    calibration(range(4), keep)
    for end in (3, 2, 1):
        found, done = {}, []
        again = BlockwiseCalibration(model, decoder, windows, BOTH, 2)
        again(range(4), found.__setitem__, done.append, end, gradients[end])
        assert sorted(found) == list(range(end)) and sum(done) == passes(end, 0)
        for b, known in found.items():
            assert_same(known, whole[b])


def test_inputs_of_a_block_are_let_go_of_when_it_is_done():
    model, windows = tiny_llama(layers=4), random_windows(4, 16)
    decoder, alive = find_decoder(model), []
    calibration = BlockwiseCalibration(model, decoder, windows, BOTH, 2)

    def keep(b, found):
        alive.append(len(calibration.inputs))

    calibration(range(4), keep)
    assert alive == [3, 2, 1, 0]  # inputs of the blocks that are left


def test_activations_that_are_not_finite_name_the_block_that_gives_them():
    model = tiny_llama(layers=3)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1 gives activations that are not finite"):
        collect_importances(model, find_decoder(model), random_windows(2, 8), DIAGONAL)
    assert not any("forward" in vars(block) for block in model.model.layers)
    assert all(p.requires_grad for p in model.parameters())
