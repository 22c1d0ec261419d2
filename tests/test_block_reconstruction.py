"""Each phase of a block lowers its loss, in the rounds of its schedule, with any initializer."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, random_windows
from torch import nn
from transformers.pytorch_utils import Conv1D

from nanoquant import block_tuning
from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.architectures import capture_block_inputs, find_decoder, run_block
from nanoquant.binary import BinaryFactors, sign
from nanoquant.block_config import BlockConfig
from nanoquant.block_reconstruction import BlockReconstructor
from nanoquant.block_tuning import BlockData, BlockObjective
from nanoquant.calibration import collect_importances
from nanoquant.fit_result import FitResult
from nanoquant.importance import ImportanceConfig
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.schedules import SCHEDULES

INITIALIZE_ONLY = BlockConfig(schedule="grouped", windows=4, dense_epochs=0, refine_epochs=0)
BRISK = {"latent_lr": 1e-2, "scale_lr": 1e-2, "refine_batch": 2, "relative_rates": True}


def prepare(family="llama", rank=16):
    """First block of a tiny model with all that its reconstruction needs."""
    model = FAMILIES[family]()
    decoder, windows = find_decoder(model), random_windows(4, 24)
    found = collect_importances(model, decoder, windows, ImportanceConfig())
    names = decoder.linears[0]
    hidden, calls = capture_block_inputs(model, decoder, windows)
    block = decoder.blocks[0]
    with torch.no_grad():
        targets = run_block(block, hidden, calls[0])
    return SimpleNamespace(
        block=block,
        names=names,
        groups=decoder.groups[0],
        importances={name: found[decoder.full_name(0, name)] for name in names},
        ranks=dict.fromkeys(names, rank),
        data=BlockData(hidden, targets, calls[0]),
    )


def reconstruct(setup, config, initializer=None, data="given", **kwargs):
    initializer = initializer or ADMMInitializer(ADMMConfig(iterations=20))
    return BlockReconstructor(config, initializer)(
        setup.block,
        setup.groups,
        setup.importances,
        setup.ranks,
        setup.data if data == "given" else data,
        **kwargs,
    )


def block_loss(setup):
    weight = setup.importances[setup.names[-1]].output
    with torch.no_grad():
        objective = BlockObjective("loss", setup.block, setup.data, weight, [])
        return float(objective((setup.data.inputs, setup.data.targets)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_linear_ends_frozen(schedule):
    setup = prepare()
    report = reconstruct(setup, dataclasses.replace(INITIALIZE_ONLY, schedule=schedule))
    layers = [setup.block.get_submodule(name) for name in setup.names]
    assert all(isinstance(layer, BinaryLowRankLinear) and layer.frozen for layer in layers)
    assert report.weight_error.keys() == set(setup.names)
    assert all(0 < error < 1 for error in report.weight_error.values())


def test_latents_stay_when_the_block_is_not_to_be_frozen():
    latent, frozen = prepare(), prepare()
    reconstruct(latent, INITIALIZE_ONLY, freeze=False)
    reconstruct(frozen, INITIALIZE_ONLY)
    for name in latent.names:
        a, b = latent.block.get_submodule(name), frozen.block.get_submodule(name)
        assert not a.frozen and b.frozen
        assert torch.equal(a.factors().dense(), b.factors().dense())


def test_refinement_lowers_the_block_loss():
    plain, refined = prepare(), prepare()
    reconstruct(plain, INITIALIZE_ONLY)
    config = dataclasses.replace(INITIALIZE_ONLY, refine_epochs=6, **BRISK)
    report = reconstruct(refined, config)
    assert block_loss(refined) < block_loss(plain)
    assert report.loss["after refine"] < report.loss["before refine"]


@pytest.mark.parametrize("freeze", [True, False])
def test_a_joint_pass_trains_all_linears_of_the_block_once_it_is_complete(freeze):
    plain, joint = prepare(), prepare()
    reconstruct(plain, INITIALIZE_ONLY)
    config = dataclasses.replace(INITIALIZE_ONLY, joint_epochs=6, **BRISK)
    reconstruct(joint, config, freeze=freeze)
    assert block_loss(joint) < block_loss(plain)
    for name in joint.names:
        layer, before = joint.block.get_submodule(name), plain.block.get_submodule(name)
        assert layer.frozen == freeze and before.frozen
        assert not torch.equal(sign(layer.factors().U), before.factors().U)


def test_tuning_dense_weights_lowers_the_block_loss():
    plain, tuned = prepare(), prepare()
    reconstruct(plain, INITIALIZE_ONLY)
    config = dataclasses.replace(INITIALIZE_ONLY, dense_epochs=8, dense_lr=2e-3, dense_batch=2)
    reconstruct(tuned, config)
    assert block_loss(tuned) < block_loss(plain)


def test_only_the_linears_of_the_round_and_then_only_dense_ones_train(monkeypatch):
    setup, phases = prepare(), []
    ids = {}

    def record(objective, loader, config, **kwargs):
        trained = {id(p) for group in objective.parameter_groups() for p in group["params"]}
        ids.clear()
        ids.update({id(p): n for n, p in setup.block.named_parameters()})
        assert trained == {id(p) for p in setup.block.parameters() if p.requires_grad}
        layers = {ids[key].rpartition(".")[0] for key in trained}
        parts = {ids[key].rpartition(".")[2] for key in trained}
        phases.append((objective.name, layers, parts))
        return FitResult([1.0] * kwargs["epochs"] * len(loader), epochs=kwargs["epochs"])

    monkeypatch.setattr(block_tuning, "fit", record)
    config = dataclasses.replace(INITIALIZE_ONLY, dense_epochs=1, refine_epochs=1)
    reconstruct(setup, config, name="block 0")
    left = list(setup.names)
    for k, group in enumerate(setup.groups):
        dense, refine = phases[2 * k], phases[2 * k + 1]
        assert dense == (f"block 0 tune dense before {', '.join(group)}", set(left), {"weight"})
        assert refine == (f"block 0 refine {', '.join(group)}", set(group), {"U", "V", "s1", "s2"})
        left = [name for name in left if name not in group]


def test_refinement_leaves_earlier_rounds_as_they_were():
    setup, signs = prepare(), []

    def spy(W, importance, rank, generator):
        layers = [m for m in setup.block.modules() if isinstance(m, BinaryLowRankLinear)]
        signs.append([(m, m.factors()) for m in layers if m.frozen])
        return ADMMInitializer(ADMMConfig(iterations=5))(W, importance, rank, generator)

    config = dataclasses.replace(INITIALIZE_ONLY, refine_epochs=1, latent_lr=1e-2, scale_lr=1e-2)
    reconstruct(setup, config, spy)
    assert signs[-1]
    for before in signs:
        for layer, earlier in before:
            now = layer.factors()
            assert torch.equal(now.U, earlier.U) and torch.equal(now.s1, earlier.s1)


def test_equal_shapes_of_a_round_are_initialized_in_one_batch():
    setup, shapes = prepare(), []

    def spy(W, importance, rank, generator):
        shapes.append(tuple(W.shape))
        assert importance.input.shape == (W.shape[0], W.shape[2])
        return ADMMInitializer(ADMMConfig(iterations=2))(W, importance, rank, generator)

    reconstruct(setup, INITIALIZE_ONLY, spy)
    assert shapes == [(1, 64, 64), (2, 32, 64), (1, 64, 64), (2, 96, 64), (1, 64, 96)]


def test_any_initializer_can_be_passed_in():
    def sign_of_weight(W, importance, rank, generator):
        U = torch.eye(W.shape[-2], rank).expand(*W.shape[:-1], rank)
        ones = torch.ones(W.shape[:-1]), torch.ones(W.shape[0], W.shape[2])
        return BinaryFactors(U, W.mT[..., :rank], *ones)

    setup = prepare()
    before = copy.deepcopy(setup.block)
    reconstruct(setup, INITIALIZE_ONLY, sign_of_weight)
    for name in setup.names:
        W, factors = before.get_submodule(name).weight, setup.block.get_submodule(name).factors()
        assert torch.equal(factors.V, sign(W.mT[:, :16].detach()))


def test_norms_keep_value_and_dtype_and_biases_stay_float32_with_their_scales():
    setup = prepare("qwen2")
    setup.block.bfloat16()
    before = {n: p.detach().clone() for n, p in setup.block.named_parameters() if "norm" in n}
    reconstruct(setup, INITIALIZE_ONLY, data=None)
    after = dict(setup.block.named_parameters())
    assert before and all(torch.equal(after[n], p) for n, p in before.items())
    assert all(after[n].dtype == torch.bfloat16 for n in before)
    assert setup.block.get_submodule(setup.names[0]).bias.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_is_not_tuned_is_converted_linear_by_linear(family, monkeypatch):
    """The same result as from a block that is copied to float32 first, and only one round's weights are copied."""
    found, wide = [], []
    for whole in (False, True):
        setup = prepare(family)
        setup.block.bfloat16()

        def spy(W, importance, rank, generator, block=setup.block):
            dense = {m.weight.dtype for m in block.modules() if isinstance(m, nn.Linear | Conv1D)}
            wide.append(torch.float32 in dense)
            return ADMMInitializer(ADMMConfig(iterations=3))(W, importance, rank, generator)

        if whole:
            monkeypatch.setattr(BlockReconstructor, "initialize", copied_first)
        report = reconstruct(setup, INITIALIZE_ONLY, spy, data=None)
        found.append((setup.block.state_dict(), report))
    (state, report), (expected, expected_report) = found
    assert report == expected_report and state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not any(wide[: len(wide) // 2]) and any(wide)


def copied_first(self, block, *arguments, plain=BlockReconstructor.initialize):
    self._prepare(block, [n for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)])
    return plain(self, block, *arguments)


def test_blocks_of_conv1d_work():
    setup = prepare("gpt2")
    config = dataclasses.replace(INITIALIZE_ONLY, refine_epochs=1, dense_epochs=1)
    report = reconstruct(setup, config)
    for name in setup.names:
        layer = setup.block.get_submodule(name)
        assert isinstance(layer, BinaryLowRankLinear) and layer.bias is not None
    assert len(report.weight_error) == 4 and block_loss(setup) < 1


def test_objective_is_one_for_a_block_that_gives_zero():
    class Zero(nn.Module):
        def forward(self, hidden):
            return torch.zeros_like(hidden)

    setup = prepare()
    call = dataclasses.replace(setup.data.call, args=(), kwargs={}, hidden_key=None)
    data = dataclasses.replace(setup.data, call=call)
    weight = torch.rand(64, generator=torch.manual_seed(0))
    loss = BlockObjective("zero", Zero(), data, weight, [])((data.inputs, data.targets))
    assert float(loss) == pytest.approx(1, rel=1e-5)
