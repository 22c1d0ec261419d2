"""What is recorded of layers is true, complete, and changes nothing."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_recorder import Kept
from tiny_models import random_windows, tiny_gpt2, tiny_llama

from nanoquant import layer_records
from nanoquant.admm import ADMMConfig
from nanoquant.binary import relative_error, sign
from nanoquant.block_config import BlockConfig
from nanoquant.budget import BudgetConfig
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.importance import Importance
from nanoquant.layer_records import (
    BlockWatch,
    ModelWatch,
    SignSample,
    latent_histogram,
    layer_error,
)
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_config import ModelConfig
from nanoquant.quantize import quantize

CONFIG = nanoquant_config(
    bits=1.5,
    budget=BudgetConfig(rank_multiple=8),
    calibration=CalibrationConfig(windows=4, length=32),
    admm=ADMMConfig(iterations=5),
    block=BlockConfig(
        schedule="algorithm1", windows=4, dense_epochs=2, refine_epochs=1, dense_lr=1e-3
    ),
    model=ModelConfig(windows=16, held_out=2),
)
TOKENS = random_windows(1, 2000)[0]


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def recorded(request):
    """A quantized model, its dense weights, its report and every record of its run."""
    model, kept = request.param(), Kept()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = quantize(model, TOKENS, CONFIG, recorder=kept)
    return model, dense, report, kept.records


def of(records, phase, metric):
    return [r for r in records if r["phase"] == phase and metric in r]


def test_every_layer_has_its_error_after_each_phase_that_changes_it(recorded):
    _, _, report, records = recorded
    for phase, metric in (("initialize", "error"), ("block", "error"), ("model", "error")):
        assert {r["layer"] for r in of(records, phase, metric)} == report.ranks.keys()
    for record in of(records, "initialize", "rank"):
        assert record["rank"] == report.ranks[record["layer"]]
    weights = sum(r["weights"] for r in of(records, "initialize", "bits"))
    stored = sum(r["weights"] * r["bits"] for r in of(records, "initialize", "bits"))
    assert stored / weights == pytest.approx(report.bits)


def test_targets_are_the_tuned_weights_and_errors_refer_to_the_first_ones(recorded):
    _, _, report, records = recorded
    drift = {r["layer"]: r["drift"] for r in of(records, "block", "drift")}
    assert drift.keys() == report.ranks.keys() and sum(d > 0 for d in drift.values()) > 1
    for r in of(records, "initialize", "error"):
        errors = report.blocks[r["block"]].weight_error
        assert r["target_error"] == errors[r["layer"].split(f".{r['block']}.")[1]]
        if drift[r["layer"]] > 1e-4:
            assert r["error"] != r["target_error"]


def test_losses_rates_flips_and_histograms_of_the_model_are_there(recorded):
    _, _, report, records = recorded
    assert [r["loss"] for r in of(records, "model", "loss")] == report.model.losses
    held_out = {r["step"]: r["held_out"] for r in of(records, "model", "held_out")}
    assert held_out == report.model.held_out
    rates = [r["rate"] for r in of(records, "model", "rate")]
    assert all(0 < rate <= CONFIG.model.latent_lr for rate in rates)
    flips = of(records, "model", "flips")
    assert flips[-1]["step"] == 8 and all(0 <= r["flips"] < 0.5 for r in flips)
    assert flips[-1]["flips_since_start"] > 0
    assert sorted({r["step"] for r in of(records, "model", "latent_counts")}) == [0, 4, 8]
    assert len({r["layer"] for r in of(records, "model", "latent_counts")}) == 4


def test_steps_of_a_block_go_on_from_phase_to_phase(recorded):
    records = [r for r in recorded[3] if r["phase"] == "block" and r["block"] == 0]
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == list(range(len(steps)))
    assert {r["stage"] for r in records if "loss" in r} == {"tune dense", "refine"}
    assert sum("seconds" in r for r in records) == 1


def test_recording_changes_nothing(recorded):
    model = tiny_gpt2() if "GPT2" in type(recorded[0]).__name__ else tiny_llama()
    quantize(model, TOKENS, CONFIG)
    expected, found = recorded[0].state_dict(), model.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_nothing_is_computed_that_nobody_wants(monkeypatch):
    for name in ("weight_error", "layer_error", "latent_histogram", "SignSample"):
        monkeypatch.setattr(layer_records, name, None)
    quantize(tiny_llama(), TOKENS, CONFIG)


def test_scales_only_training_has_no_flips():
    kept = Kept()
    model = dataclasses.replace(CONFIG.model, train="scales")
    block = BlockConfig(dense_epochs=0, refine_epochs=0)
    quantize(
        tiny_llama(), TOKENS, dataclasses.replace(CONFIG, model=model, block=block), recorder=kept
    )
    assert of(kept.records, "model", "loss") and not of(kept.records, "model", "flips")
    assert not of(kept.records, "model", "latent_counts")
    for record in of(kept.records, "initialize", "error"):
        assert record["error"] == record["target_error"]


def test_the_error_of_a_layer_is_the_weighted_one():
    W, layer = torch.randn(6, 10), BinaryLowRankLinear(10, 6, 3).requires_grad_(False)
    importance = Importance(input=torch.rand(10) + 0.1, output=torch.rand(6) + 0.1)
    weight = importance.output[:, None] * importance.input
    approximation = layer.s1[:, None] * (sign(layer.U) @ sign(layer.V).T) * layer.s2
    expected = relative_error(W, approximation, weight)
    assert layer_error(layer, W, importance) == pytest.approx(float(expected), rel=1e-6)
    assert layer_error(layer.freeze(), W, importance) == pytest.approx(float(expected), rel=1e-6)


def test_the_histogram_counts_every_latent_once_whatever_the_scale():
    layer = BinaryLowRankLinear(50, 40, 8)
    histogram = latent_histogram(layer)
    layer.U.data *= 100
    assert latent_histogram(layer) == histogram
    assert sum(histogram["latent_counts"]) == 90 * 8
    assert len(histogram["latent_edges"]) == len(histogram["latent_counts"]) + 1


def test_flips_are_counted_since_the_last_time_and_since_the_start():
    layer = BinaryLowRankLinear(100, 100, 20)
    sample = SignSample([layer])
    assert sample.flips() == {"flips": 0.0, "flips_since_start": 0.0}
    layer.U.data[:50] *= -1
    assert sample.flips()["flips"] == pytest.approx(0.25, abs=0.05)
    layer.U.data[:50] *= -1
    layer.V.data[:20] *= -1
    flips = sample.flips()
    assert flips["flips"] == pytest.approx(0.35, abs=0.05)
    assert flips["flips_since_start"] == pytest.approx(0.1, abs=0.05)


def test_a_training_that_goes_on_records_what_is_still_due_and_nothing_of_the_start():
    layer = BinaryLowRankLinear(20, 20, 8)
    records = []
    recorder = SimpleNamespace(wanted=True, record=lambda phase, **fields: records.append(fields))
    watch = ModelWatch(recorder, {"a": layer}, 40, 32)
    for step in range(32, 40):
        watch.step(step, loss=1.0)
    watch.finish(40)
    assert [r["step"] for r in records if "flips" in r] == [35, 40]
    assert [r["step"] for r in records if "latent_counts" in r] == [40]
    assert not any("flips_since_start" in r for r in records)


def test_long_loops_are_thinned_out_and_counted_in_full():
    kept = Kept()
    watch = BlockWatch(kept, {})
    watch.losses("refine", [float(n) for n in range(1000)])
    watch.losses("refine", [])
    watch.losses("refine", [1.0])
    assert len(kept.records) <= 65 and kept.records[-1]["step"] == 1000
    assert [r["loss"] for r in kept.records[:3]] == [0.0, 16.0, 32.0]
