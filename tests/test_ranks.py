"""The choice of ranks within a run: each allocation at the same bits, on record, with what is left unspent."""

import dataclasses
import logging

import pytest
from tiny_models import FAMILIES, random_windows, tiny_llama

from nanoquant.admm import ADMMConfig
from nanoquant.architectures import find_decoder
from nanoquant.budget import BudgetConfig, allocate_ranks, body_bits
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.model_reconstruction import ModelConfig
from nanoquant.quantize import phase_names, quantize
from nanoquant.ranks import LARGE_REMAINDER, decoder_shapes
from nanoquant.sensitivity import SensitivityConfig

TOKENS = random_windows(8, 16).flatten()


def quick(**budget):
    """Initialization only, of a tiny model."""
    return nanoquant_config(
        budget=BudgetConfig(**{"bits": 1.2, "rank_multiple": 8} | budget),
        calibration=CalibrationConfig(windows=4, length=16),
        admm=ADMMConfig(iterations=2),
        sensitivity=SensitivityConfig(iterations=2, length=8),
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


def test_ranks_are_a_phase_only_where_they_are_measured():
    phases = {a: phase_names(quick(allocation=a), False) for a in ("uniform", "prior", "measured")}
    assert phases["uniform"] == phases["prior"] == ["calibrate", "blocks", "pack"]
    assert phases["measured"] == ["calibrate", "ranks", "blocks", "pack"]
    report = quantize(tiny_llama(), TOKENS, quick(allocation="measured"))
    assert list(report.seconds) == phases["measured"]


def test_the_prior_follows_depth_and_kind():
    config = quick(allocation="prior", bits=1.6, rank_multiple=1, low=0.0)
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
