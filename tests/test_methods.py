"""Both methods run through the same phases; what differs is refused, planned, trained and kept by its own rules."""

import copy
import dataclasses
import json

import pytest
import torch
from test_block_reconstruction import block_loss, prepare
from test_model_reconstruction import HELD_OUT, TRAINING, held_out_divergence, same_state
from test_unfinished import killed, run
from tiny_models import FAMILIES, tiny_llama

from nanoquant.admm import ADMMInitializer
from nanoquant.architectures import as_linear, find_decoder
from nanoquant.binary import relative_error
from nanoquant.block_config import BlockConfig
from nanoquant.block_reconstruction import BlockReconstructor
from nanoquant.config import PRESETS, NanoQuantConfig, nanoquant_config, preset_config
from nanoquant.importance import Importance
from nanoquant.methods import METHODS, ProductConfig, body_bits, entry_of, layer_of, size_of
from nanoquant.model_config import ModelConfig
from nanoquant.model_reconstruction import ModelReconstructor
from nanoquant.product import KMeansConfig, KMeansInitializer
from nanoquant.product_budget import ProductShape
from nanoquant.product_linear import ProductQuantLinear

SHAPE = ProductShape(4, (4,))
TINY = {
    "method": "product",
    "bits": 2.0,
    "calibration": {"windows": 4, "length": 16},
    "model": {"windows": 7, "epochs": 10, "batch": 2, "held_out": 2, "evaluations": 7},
    "run": {"save_every": 0},
}
TRAINED = ModelConfig(windows=24, epochs=3, batch=4, held_out=4)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ProductQuantLinear)}


def teacher_and_student(build=tiny_llama):
    """A tiny model, and the same one with its linears looked up."""
    teacher = build().requires_grad_(False)
    student = copy.deepcopy(teacher)
    for name, module in find_decoder(student).linear_modules().items():
        linear = as_linear(module)
        d_out, d_in = linear.weight.shape
        uniform = Importance(input=torch.ones(d_in), output=torch.ones(d_out))
        factors = KMeansInitializer()(linear.weight, uniform, SHAPE)
        student.set_submodule(name, layer_of(factors, linear.bias))
    return teacher, student


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_for_product_differs_from_the_preset_in_what_product_does_not_read(preset):
    usual, config = PRESETS[preset](), preset_config(preset, "product")
    assert (config.preset, config.method) == (preset, "product")
    changed = {
        f"{stage}.{name}"
        for stage in ("budget", "importance", "block", "model", "embedding", "run")
        for name, value in vars(getattr(config, stage)).items()
        if value != getattr(getattr(usual, stage), name)
    }
    assert changed <= set(METHODS["product"].unused)
    assert preset_config(preset) == usual


@pytest.mark.parametrize(
    ("method", "fields", "what"),
    [
        ("product", {"admm": {"iterations": 7}}, r"admm\.\* and method=product"),
        ("product", {"budget": {"allocation": "measured"}}, "budget.allocation=measured"),
        ("product", {"budget": {"rank_multiple": 8}}, "budget.rank_multiple=8"),
        ("product", {"importance": {"curvature": "inputs"}}, "importance.curvature=inputs"),
        ("product", {"model": {"latent_lr": 0.5}}, "model.latent_lr=0.5"),
        ("binary", {"product": {"group": 8}}, r"product\.\* and method=binary"),
        ("binary", {"model": {"codebook_lr": 0.5}}, "model.codebook_lr=0.5 and method=binary"),
        ("product", {"product": {"group": 7}}, "product.group=7, .* none of the kinds"),
        ("trellis", {}, "method must be one of binary, product, got 'trellis'"),
    ],
)
def test_what_a_method_does_not_read_is_refused_by_name(method, fields, what):
    with pytest.raises(ValueError, match=what):
        nanoquant_config(method=method, **fields)


def test_fields_of_codebooks_may_stand_beside_the_method():
    config = nanoquant_config(2.1, method="product", group=8, codebooks=(8, 8))
    deep = nanoquant_config(2.1, method="product", product={"group": 8, "codebooks": (8, 8)})
    both = nanoquant_config(2.1, method="product", group=8, product=ProductConfig(codebooks=(8, 8)))
    assert config == deep == both
    with pytest.raises(ValueError, match=r"product\.\* and method=binary exclude"):
        nanoquant_config(group=8)


def test_a_config_of_codebooks_comes_back_from_json():
    config = nanoquant_config(2.1, method="product", product={"group": 8, "codebooks": (8, 8)})
    assert config.product.menu.keys() == {(8, (8, 8))}
    assert NanoQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("size", [32, ProductShape(8, (8, 4), 2)])
def test_a_size_comes_back_from_json(size):
    assert size_of(json.loads(json.dumps(entry_of(size)))) == size


@pytest.mark.parametrize(
    "config",
    [
        ProductConfig(),
        ProductConfig(group=4),
        ProductConfig(residual=True),
        ProductConfig(residual=False),
    ],
)
@pytest.mark.parametrize("bits", [1.5, 2.5])
def test_planned_codebooks_meet_the_bits_and_the_kinds_that_are_asked_for(bits, config):
    shapes = {f"layer {k}": (256, 128) for k in range(8)}
    asked = nanoquant_config(bits, method="product", product=config)
    sizes = METHODS["product"].plan(shapes, asked)
    assert 0.98 * bits <= body_bits(shapes, sizes) <= bits
    assert config.group is None or {size.group for size in sizes.values()} == {4}
    if config.residual is not None:
        assert {len(size.widths) for size in sizes.values()} == {1 + config.residual}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refinement_trains_codebooks_and_scales_and_lowers_the_loss_of_the_block(family):
    losses, books = [], []
    for rate, epochs in ((1e-2, 0), (1e-2, 10), (1e-3, 1)):
        setup = prepare(family)
        config = BlockConfig(
            schedule="algorithm1", windows=4, dense_epochs=0, refine_epochs=epochs,
            codebook_lr=rate, scale_lr=1e-2, refine_batch=2, relative_rates=True,
        )  # fmt: skip
        report = BlockReconstructor(config, KMeansInitializer())(
            setup.block,
            setup.groups,
            setup.importances,
            dict.fromkeys(setup.names, SHAPE),
            setup.data,
        )
        layers = layers_of(setup.block)
        assert layers.keys() == set(setup.names) == report.weight_error.keys()
        assert not epochs or not any(p.requires_grad for p in setup.block.parameters())
        losses.append(block_loss(setup))
        books.append([layer.codebook for layer in layers.values()])
    assert losses[1] < 0.9 * losses[0]
    for pair in zip(*books[1:], strict=True):
        assert not torch.equal(*pair)  # the rate is heeded


def test_indices_are_chosen_anew_within_refinement_nearer_to_the_dense_weights(monkeypatch):
    setup, shares, inner = prepare("llama"), [], ProductQuantLinear.reassign
    dense = {name: setup.block.get_submodule(name).weight.clone() for name in setup.names}

    def spy(layer, weight, importance, beam):
        assert beam == 3
        name = next(name for name, one in layers_of(setup.block).items() if one is layer)
        assert torch.equal(weight, dense[name])
        each = importance.output.unsqueeze(-1) * importance.input
        before = relative_error(weight, layer.factors().dense(), each)
        shares.append((name, inner(layer, weight, importance, beam)))
        assert relative_error(weight, layer.factors().dense(), each) <= before

    monkeypatch.setattr(ProductQuantLinear, "reassign", spy)
    config = BlockConfig(
        schedule="grouped", windows=4, dense_epochs=0, refine_epochs=4, codebook_lr=3e-2,
        scale_lr=1e-2, refine_batch=4, reassign=2,
    )  # fmt: skip
    sizes = dict.fromkeys(setup.names, SHAPE)
    BlockReconstructor(config, KMeansInitializer(KMeansConfig(beam=3)))(
        setup.block, setup.groups, setup.importances, sizes, setup.data
    )
    assert sorted(name for name, _ in shares) == sorted(2 * setup.names)
    assert all(0 < share < 1 for _, share in shares)


def test_signs_have_no_indices_to_choose_anew_and_a_best_state_keeps_none():
    setup = prepare()
    with pytest.raises(ValueError, match="block: reassign=1 is for weights that are looked up"):
        BlockReconstructor(BlockConfig(refine_epochs=2, reassign=1), ADMMInitializer())(
            *(setup.block, setup.groups, setup.importances, setup.ranks, setup.data), name="block"
        )
    with pytest.raises(ValueError, match="held_out=2 and reassign=1 exclude each other"):
        BlockConfig(refine_epochs=2, reassign=1, held_out=2)


@pytest.mark.parametrize("times", [-1, 2])
def test_choosing_anew_leaves_epochs_around_it(times):
    with pytest.raises(ValueError, match=f"reassign must be at least 0 .* got {times} with"):
        BlockConfig(refine_epochs=2, joint_epochs=3, reassign=times)


@pytest.mark.parametrize("build", [tiny_llama, FAMILIES["gpt2"]])
@pytest.mark.parametrize("train", ["signs", "scales"])
def test_the_model_phase_trains_what_it_says_and_follows_the_teacher(train, build):
    teacher, student = teacher_and_student(build)
    start = copy.deepcopy(student)
    config = dataclasses.replace(TRAINED, train=train)
    ModelReconstructor(config)(student, teacher, TRAINING, HELD_OUT)
    assert held_out_divergence(student, teacher) < 0.98 * held_out_divergence(start, teacher)
    changed = {
        name.rpartition(".")[2] for name in start.state_dict().keys() - same_state(start, student)
    }
    within = {name for name in layers_of(student)}
    norms = {
        name
        for name in start.state_dict().keys() - same_state(start, student)
        if name.rpartition(".")[0] not in within
    }
    assert {"indices", "indices2"}.isdisjoint(changed) and "scale" in changed
    assert ("codebook" in changed) == bool(norms) == (train == "signs")
    assert all("norm" in name or "ln_" in name for name in norms)


@pytest.mark.parametrize("step", [0, 20])
def test_a_killed_run_of_codebooks_ends_bit_for_bit_like_an_uninterrupted_one(step, tmp_path):
    config = nanoquant_config(**TINY)
    expected, whole, _ = run(None, config)
    killed(tmp_path, step, config=config)
    found, report, counts = run(tmp_path, config)
    assert list(counts) == ["model", "pack"]  # nothing before is done again
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert report.ranks == whole.ranks and report.model == whole.model


def test_a_killed_run_between_blocks_goes_on_with_those_that_are_kept(tmp_path):
    block = {"schedule": "algorithm1", "windows": 4, "refine_epochs": 1}
    config = nanoquant_config(**TINY, block=block)
    expected, _, _ = run(None, config)
    killed(tmp_path, 0, phase="blocks", config=config)
    found, _, counts = run(tmp_path, config)
    assert counts["blocks"] == [1, 2]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
