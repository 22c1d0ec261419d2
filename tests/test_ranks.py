"""The choice of ranks within a run: each allocation at the same bits, on record, with what is left unspent."""

import dataclasses
import logging

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_llama

from nanoquant.admm import ADMMConfig
from nanoquant.architectures import find_decoder
from nanoquant.budget import BudgetConfig, allocate_ranks, body_bits
from nanoquant.checkpoint import load, read_sizes, save_pretrained
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.model_config import ModelConfig
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.quantize import phase_names, quantize
from nanoquant.ranks import LARGE_REMAINDER, decoder_shapes
from nanoquant.sensitivity import SensitivityConfig

TOKENS = random_windows(8, 16).flatten()


def quick(**budget):
    """Initialization only, of a tiny model."""
    measured = budget.get("allocation") == "measured"
    return nanoquant_config(
        budget=BudgetConfig(**{"bits": 1.2, "rank_multiple": 8} | budget),
        calibration=CalibrationConfig(windows=4, length=16),
        admm=ADMMConfig(iterations=2),
        sensitivity=SensitivityConfig(iterations=2, length=8) if measured else SensitivityConfig(),
        model=ModelConfig(train="none"),
    )


class Records:
    """A recorder that keeps the records of ranks."""

    wanted = True

    def __init__(self):
        self.ranks = {}

    def record(self, phase, *, layer=None, **metrics):
        if phase == "ranks":
            self.ranks[layer] = metrics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocation", ["prior", "measured"])
def test_every_family_is_quantized_at_the_asked_bits_and_not_uniformly(family, allocation):
    shapes = decoder_shapes(find_decoder(FAMILIES[family]()), range(2))
    report = quantize(FAMILIES[family](), TOKENS, quick(allocation=allocation, depth_slope=2.0))
    assert 0.97 * 1.2 <= report.bits <= 1.2
    uniform = allocate_ranks(shapes, BudgetConfig(bits=1.2, rank_multiple=8))
    assert any(report.ranks[name] != rank for name, rank in uniform.items())


@pytest.mark.parametrize("allocation", ["uniform", "prior", "measured"])
def test_ranks_and_what_they_follow_from_are_on_record(allocation):
    records = Records()
    report = quantize(tiny_llama(), TOKENS, quick(allocation=allocation), recorder=records)
    assert {name: row["rank"] for name, row in records.ranks.items()} == report.ranks
    for row in records.ranks.values():
        measured = {"uniform_rank", "loss_at_uniform", "exponent"} <= row.keys()
        assert measured == (allocation == "measured")


WIDE = {"hidden_size": 256, "intermediate_size": 512}


def wide_llama():
    return tiny_llama(dtype=torch.bfloat16, **WIDE)


@pytest.mark.parametrize("allocation", ["uniform", "prior", "measured"])
def test_two_bits_work_from_text_to_the_reloaded_checkpoint(allocation, tmp_path):
    config = quick(bits=2.0, rank_multiple=32, allocation=allocation)
    config = dataclasses.replace(
        config, model=ModelConfig(windows=4, epochs=1, batch=2, held_out=2)
    )
    model = wide_llama()
    report = quantize(model, TOKENS, config)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}
    assert {name: layer.rank for name, layer in layers.items()} == report.ranks
    wide = [n for n, m in layers.items() if m.rank > min(m.in_features, m.out_features)]
    assert any("up_proj" in name for name in wide)
    tensors = (t for m in layers.values() for t in (m.u_signs, m.v_signs, m.s1, m.s2))
    stored = 8 * sum(t.numel() * t.element_size() for t in tensors)
    bits = stored / sum(m.in_features * m.out_features for m in layers.values())
    assert 0.97 * 2.0 < bits <= 2.0 and report.bits == pytest.approx(bits)
    folder = save_pretrained(model, tmp_path / "out")
    assert read_sizes(folder).body_bits_per_weight == pytest.approx(bits)
    loaded, ids = load(folder), random_windows(2, 12, seed=5)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_error_of_every_linear_falls_with_bits_beyond_full_rank():
    errors = []
    for bits in (1.0, 1.5, 2.0, 2.5):
        config = dataclasses.replace(quick(bits=bits), admm=ADMMConfig(iterations=20))
        blocks = quantize(wide_llama(), TOKENS, config).blocks
        errors.append([e for block in blocks.values() for e in block.weight_error.values()])
    for more, fewer in zip(errors[1:], errors[:-1], strict=True):
        assert all(b < 0.8 * a for a, b in zip(fewer, more, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_beyond_full_rank(family):
    report = quantize(FAMILIES[family](), TOKENS, quick(bits=2.9))
    shapes = decoder_shapes(find_decoder(FAMILIES[family]()), range(2))
    assert 0.97 * 2.9 <= report.bits <= 2.9
    assert any(rank > min(shapes[name]) for name, rank in report.ranks.items())


def test_more_bits_than_the_largest_ranks_take_are_refused_with_the_excess():
    with pytest.raises(ValueError, match=r"rank 2 times the smaller.* 3\.\d+; .* 0\.\d+ too high"):
        quantize(wide_llama(), TOKENS, quick(bits=4.2))


def test_ranks_are_a_phase_only_where_they_are_measured():
    phases = {a: phase_names(quick(allocation=a), False) for a in ("uniform", "prior", "measured")}
    assert phases["uniform"] == phases["prior"] == ["calibrate", "blocks", "pack"]
    assert phases["measured"] == ["calibrate", "ranks", "blocks", "pack"]
    report = quantize(tiny_llama(), TOKENS, quick(allocation="measured"))
    assert list(report.seconds) == phases["measured"]


def test_the_prior_follows_depth_and_kind():
    config = quick(allocation="prior", bits=1.6, rank_multiple=1, low=0.0, depth_slope=0.6)
    ranks = quantize(tiny_llama(), TOKENS, config).ranks
    layer = "model.layers.{}.{}".format
    assert ranks[layer(1, "mlp.up_proj")] > ranks[layer(0, "mlp.up_proj")]
    assert ranks[layer(0, "self_attn.v_proj")] > ranks[layer(0, "self_attn.k_proj")]


def test_only_chosen_blocks_are_measured_and_share_the_bits():
    config = dataclasses.replace(quick(allocation="measured"), blocks="1:2")
    report = quantize(tiny_llama(), TOKENS, config)
    assert all(name.startswith("model.layers.1.") for name in report.ranks)
    assert 0.97 * 1.2 <= report.bits <= 1.2


def test_bits_that_the_multiple_leaves_unspent_are_told_and_a_large_rest_is_a_warning(caplog):
    shapes = decoder_shapes(find_decoder(tiny_llama()), range(2))
    rests = {}
    for bits in (1.60, 1.61, 1.62, 1.63, 1.64, 1.65, 1.66):
        ranks = allocate_ranks(shapes, BudgetConfig(bits=bits, rank_multiple=32))
        rests[bits] = bits - body_bits(shapes, ranks)
    for bits in (min(rests, key=rests.get), max(rests, key=rests.get)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "nanoquant.ranks"):
            quantize(tiny_llama(), TOKENS, quick(bits=bits, rank_multiple=32))
        (line,) = [r for r in caplog.records if r.name == "nanoquant.ranks"]
        assert f"{rests[bits]:.4f} below the asked {bits}" in line.getMessage()
        large = rests[bits] > LARGE_REMAINDER * bits
        assert line.levelno == (logging.WARNING if large else logging.INFO)
    assert max(rests.values()) > LARGE_REMAINDER * 1.66 > min(rests.values())
