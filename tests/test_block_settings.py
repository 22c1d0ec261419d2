"""Schedules give their rounds, every setting of a block changes its result, and what can not be is refused by name."""

import dataclasses
import functools

import pytest
from test_block_reconstruction import INITIALIZE_ONLY, block_loss, prepare, reconstruct
from tiny_models import tiny_llama
from torch import nn

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.architectures import find_decoder
from nanoquant.block_config import BlockConfig
from nanoquant.optimizer import OptimizerConfig
from nanoquant.schedules import SCHEDULES

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
ROUNDS = {
    "published": tuple((name,) for name in "q v o k gate up down".split()),
    "grouped": GROUPS,
    "algorithm1": (("q", "k", "v", "o", "gate", "up", "down"),),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_give_the_rounds_of_the_publications(schedule):
    assert SCHEDULES[schedule](GROUPS) == ROUNDS[schedule]


def test_published_rounds_of_a_fused_attention_follow_execution():
    groups = (("c_attn",), ("c_proj",), ("c_fc",), ("mlp.c_proj",))
    assert SCHEDULES["published"](groups) == groups


@pytest.mark.parametrize("what", ["importance", "rank"])
def test_a_linear_without_importance_or_rank_is_named(what):
    setup = prepare()
    del {"importance": setup.importances, "rank": setup.ranks}[what]["mlp.up_proj"]
    advice = {"importance": "importance for X; collect", "rank": "size for X; give a rank"}[what]
    with pytest.raises(ValueError, match="block 7: no " + advice.replace("X", "mlp.up_proj")):
        reconstruct(setup, INITIALIZE_ONLY, name="block 7")
    assert isinstance(setup.block.mlp.up_proj, nn.Linear), "the block must be untouched"


def test_tuning_without_activations_is_refused():
    setup = prepare()
    with pytest.raises(ValueError, match="inputs and targets are needed"):
        reconstruct(setup, dataclasses.replace(INITIALIZE_ONLY, refine_epochs=1), data=None)
    reconstruct(setup, INITIALIZE_ONLY, data=None)


LIVE = {
    "schedule": "published",
    "held_out": 2,
    "dense_epochs": 2,
    "dense_lr": 5e-3,
    "dense_batch": 1,
    "refine_epochs": 2,
    "joint_epochs": 1,
    "latent_lr": 5e-2,
    "scale_lr": 5e-2,
    "refine_batch": 4,
    "relative_rates": True,
    "optimizer": OptimizerConfig(beta1=0.1),
}


BASE = BlockConfig(
    schedule="grouped", dense_epochs=1, dense_lr=1e-3, refine_epochs=1, latent_lr=1e-2,
    scale_lr=1e-2, dense_batch=2, refine_batch=2,
)  # fmt: skip


@functools.cache
def loss_with(config):
    setup = prepare()
    reconstruct(setup, config, ADMMInitializer(ADMMConfig(iterations=5)))
    return block_loss(setup)


@pytest.mark.parametrize("field", LIVE)
def test_every_setting_changes_the_result(field):
    assert loss_with(BASE) != loss_with(dataclasses.replace(BASE, **{field: LIVE[field]}))


def test_every_setting_is_among_those_above():
    # windows is read by quantize, which chooses them; others have their own tests, in test_early_stop and test_methods
    elsewhere = {"windows", "patience", "codebook_lr", "reassign"}
    assert {f.name for f in dataclasses.fields(BlockConfig)} == {*LIVE, *elsewhere}


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "random"},
        {"dense_epochs": -1},
        {"joint_epochs": -1},
        {"windows": 0},
        {"refine_batch": 0},
        {"latent_lr": 0.0},
        {"scale_lr": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        BlockConfig(**changes)


def test_tiny_llama_has_the_groups_that_these_tests_assume():
    names = [[n.rpartition(".")[2] for n in g] for g in find_decoder(tiny_llama()).groups[0]]
    assert names == [[f"{n}_proj" for n in group] for group in GROUPS]
