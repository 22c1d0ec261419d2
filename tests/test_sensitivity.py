"""Loss of one binary group: measured against a plain forward, the model kept, measurements kept over a kill."""

import dataclasses
import json
import logging

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_gpt2, tiny_llama

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.architectures import as_linear, find_decoder
from nanoquant.budget import BudgetConfig, allocate_ranks, body_bits
from nanoquant.calibration import collect_importances
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.importance import ImportanceConfig
from nanoquant.model_config import ModelConfig
from nanoquant.progress import Progress
from nanoquant.quantize import quantize
from nanoquant.ranks import decoder_shapes
from nanoquant.sensitivity import (
    SensitivityConfig,
    SensitivityProbe,
    fingerprint,
    probed_ranks,
    responses,
)
from nanoquant.text import split_text

WINDOWS = random_windows(2, 16)
TOKENS = random_windows(24, 16).flatten()
MEASURED = nanoquant_config(
    budget=BudgetConfig(bits=1.2, rank_multiple=8, allocation="measured"),
    calibration=CalibrationConfig(windows=4, length=16),
    admm=ADMMConfig(iterations=5),
    sensitivity=SensitivityConfig(iterations=3, length=8),
    model=ModelConfig(train="none"),
)


def make_probe(model, spread=0.5):
    """A probe of a whole tiny model, its decoder, its ranks and its importances."""
    decoder = find_decoder(model)
    shapes = decoder_shapes(decoder, range(len(decoder.blocks)))
    ranks = allocate_ranks(shapes, BudgetConfig(rank_multiple=8))
    importances = collect_importances(model, decoder, WINDOWS, ImportanceConfig(), 2)
    initializer = ADMMInitializer(ADMMConfig(iterations=5))
    probe = SensitivityProbe(model, decoder, ranks, 8, 1.0, WINDOWS, spread, initializer, seed=3)
    return probe, decoder, ranks, importances


def logits(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_bit_for_bit_the_same_after_measuring(family):
    model = FAMILIES[family](dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe, decoder, _, importances = make_probe(model)
    for names in decoder.groups[1]:
        assert probe.measure(1, names, importances).divergence > 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), probe.dense.logits)


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2])
def test_the_divergence_is_that_of_the_model_with_this_group_alone_binary(family):
    model = family()
    probe, decoder, ranks, importances = make_probe(model)
    names, reference = decoder.groups[1][2], logits(model).log_softmax(-1)
    group = probe.measure(1, names, importances)
    for name in names:
        full = decoder.full_name(1, name)
        linear = as_linear(decoder.blocks[1].get_submodule(name))
        generator = torch.Generator().manual_seed(3)
        importance = importances[full]
        factors = probe.initializer(linear.weight, importance, ranks[full], generator)
        gap = (linear.weight.detach() - factors.dense()).square()
        o, i = importance.output.unsqueeze(-1), importance.input
        error = float(importance.scale * (o * i * gap).sum())
        assert group.errors[full][ranks[full]] == pytest.approx(error, rel=1e-4)
        linear.weight = torch.nn.Parameter(factors.dense())
        decoder.blocks[1].set_submodule(name, linear)
    binary = logits(model).log_softmax(-1)
    expected = float((reference.exp() * (reference - binary)).sum(-1).mean())
    assert group.divergence == pytest.approx(expected, rel=1e-4)


def test_an_error_falls_with_rank_and_the_shares_of_a_group_add_up_to_its_loss():
    probe, decoder, ranks, importances = make_probe(tiny_llama())
    names = decoder.groups[0][0]
    group = probe.measure(0, names, importances)
    for full, errors in group.errors.items():
        assert list(errors) == sorted(errors) and ranks[full] in errors
        assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert len(group.errors["model.layers.0.self_attn.q_proj"]) == 3
    found = responses({"group": group}, ranks)
    shares = [found[name].loss(ranks[name]) for name in found]
    assert len(shares) == 3 and sum(shares) == pytest.approx(group.divergence)
    assert all(0.05 <= found[name].exponent <= 8 for name in found)


def test_an_error_that_is_not_finite_names_linear_and_rank():
    probe, decoder, ranks, importances = make_probe(tiny_llama())
    full = "model.layers.0.mlp.down_proj"
    importances[full] = dataclasses.replace(importances[full], scale=float("inf"))
    with pytest.raises(ValueError, match=rf"error of {full} at rank \d+ is (inf|nan); take"):
        probe.measure(0, decoder.groups[0][-1], importances)


def test_an_interrupt_puts_the_dense_weights_back(monkeypatch):
    model = tiny_llama()
    probe, decoder, _, importances = make_probe(model)

    def interrupt(block):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe.dense, "logits_from", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe.measure(0, decoder.groups[0][0], importances)
    assert torch.equal(logits(model), probe.dense.logits)


@pytest.mark.parametrize(
    ("shape", "bits", "uniform", "spread", "ranks"),
    [
        ((576, 576), 1.0, 256, 0.5, [128, 256, 384]),
        ((576, 192), 1.0, 128, 0.5, [64, 128, 192]),
        ((576, 192), 1.0, 192, 0.5, [96, 192]),
        ((576, 192), 1.5, 192, 0.5, [96, 192, 288]),
        ((576, 192), 2.0, 272, 0.5, [128, 272, 384]),
        ((576, 576), 1.0, 32, 0.5, [32]),
        ((576, 576), 1.0, 256, 0.0, [256]),
        ((576, 192), 2.0, 272, 0.0, [272]),
        ((576, 576), 1.0, 256, 0.1, [224, 256, 288]),
        ((20, 100), 1.0, 20, 0.5, [20]),
    ],
)
def test_errors_are_measured_around_the_uniform_rank_within_what_the_bits_allow(
    shape, bits, uniform, spread, ranks
):
    assert probed_ranks(shape, uniform, 32, spread, bits) == ranks


class Counting(Progress):
    """Counts units of each phase, and stops after some of one."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.counts, self.stop_after = {}, stop_after

    def begin(self, name, total):
        self.now, self.counts[name] = name, [0, total]

    def advance(self, done, note=""):
        self.counts[self.now][0] += done
        if self.now == "ranks" and self.counts["ranks"][0] == self.stop_after:
            raise KeyboardInterrupt


def run(file, progress=None, config=MEASURED, tokens=TOKENS):
    """One quantization of a tiny model; its report."""
    return quantize(
        tiny_llama(), tokens, config, progress=progress or Counting(), sensitivity_file=file
    )


def test_measured_ranks_take_the_asked_bits_and_differ_from_uniform_ones():
    report = run(None)
    budget = BudgetConfig(bits=1.2, rank_multiple=8)
    config = dataclasses.replace(MEASURED, budget=budget, sensitivity=SensitivityConfig())
    uniform = run(None, config=config)
    assert report.ranks != uniform.ranks and report.ranks.keys() == uniform.ranks.keys()
    assert 0.97 * 1.2 <= report.bits <= 1.2
    shapes = decoder_shapes(find_decoder(tiny_llama()), range(2))
    assert report.bits == body_bits(shapes, report.ranks)


def test_an_interrupted_run_goes_on_where_it_was_and_chooses_the_same_ranks(tmp_path):
    file, whole, stopped, rest = tmp_path / "s.json", Counting(), Counting(stop_after=3), Counting()
    expected = run(None, whole).ranks
    assert whole.counts["ranks"] == [8, 8]
    with pytest.raises(KeyboardInterrupt):
        run(file, stopped)
    kept = json.loads(file.read_text())["groups"]
    assert len(kept) == 3
    assert run(file, rest).ranks == expected
    assert rest.counts["ranks"] == [5, 5]
    assert json.loads(file.read_text())["groups"].items() >= kept.items()
    again = Counting()
    assert run(file, again).ranks == expected and again.counts["ranks"] == [0, 0]


def last_window_turned():
    """The tokens, with only the last calibration window backwards."""
    windows = TOKENS.view(-1, 16).clone()
    last = (windows == split_text(TOKENS, None, MEASURED).calibration[-1]).all(1)
    windows[last] = windows[last].flip(1)
    return windows.flatten()


@pytest.mark.parametrize(
    "change",
    [
        {"config": dataclasses.replace(MEASURED, admm=ADMMConfig(iterations=5, ridge=0.1))},
        {"config": dataclasses.replace(MEASURED, importance=ImportanceConfig(shrinkage=0.3))},
        {"config": dataclasses.replace(MEASURED, sensitivity=SensitivityConfig(iterations=4))},
        {"tokens": TOKENS.flip(0)},
        {"tokens": last_window_turned()},
    ],
    ids=["admm", "importance", "sensitivity", "text", "one window"],
)
def test_measurements_under_other_settings_are_not_used_and_it_says_so(change, tmp_path, caplog):
    file = tmp_path / "s.json"
    run(file)
    with caplog.at_level(logging.WARNING, "nanoquant"):
        progress = Counting()
        run(file, progress, **change)
    assert progress.counts["ranks"] == [8, 8] and "another model, text or setting" in caplog.text


def test_settings_that_no_measurement_depends_on_keep_them(tmp_path):
    file, progress = tmp_path / "s.json", Counting()
    run(file)
    config = dataclasses.replace(
        MEASURED,
        admm=ADMMConfig(iterations=7),
        budget=dataclasses.replace(MEASURED.budget, depth_slope=0.5, high=1.5),
    )
    run(file, progress, config)
    assert progress.counts["ranks"] == [0, 0]


def test_the_fingerprint_knows_the_weights():
    model = tiny_llama()
    before = fingerprint(model, WINDOWS, {})
    assert before == fingerprint(tiny_llama(), WINDOWS, {})
    model.model.layers[1].mlp.down_proj.weight.data *= 1.01
    assert fingerprint(model, WINDOWS, {}) != before


def test_losses_are_measured_on_as_many_windows_as_there_are(tmp_path):
    found = []
    for windows in (1, 5):
        config = dataclasses.replace(
            MEASURED,
            calibration=dataclasses.replace(MEASURED.calibration, windows=1),
            sensitivity=dataclasses.replace(MEASURED.sensitivity, windows=windows),
        )
        file = tmp_path / f"{windows}.json"
        quantize(tiny_llama(), TOKENS, config, sensitivity_file=file)
        found.append(json.loads(file.read_text())["groups"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "fields", [{"iterations": 0}, {"windows": 0}, {"length": 1}, {"spread": 1.0}, {"spread": -0.1}]
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SensitivityConfig(**fields)


def test_limits_that_can_not_be_met_are_refused_before_calibration():
    budget = dataclasses.replace(MEASURED.budget, bits=9.0)
    progress = Counting()
    with pytest.raises(ValueError, match=r"smaller dimension .* this one is \d\.\d+ too high"):
        run(None, progress, dataclasses.replace(MEASURED, budget=budget))
    assert progress.counts == {}
