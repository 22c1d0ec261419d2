"""A configuration is one frozen object: presets, bits, blocks, and clear errors."""

import dataclasses
import json

import pytest

from nanoquant.budget import BudgetConfig
from nanoquant.config import PRESETS, CalibrationConfig, NanoQuantConfig, nanoquant_config
from nanoquant.role_weights import RoleWeights
from nanoquant.sensitivity import SensitivityConfig
from nanoquant.training import RunConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_know_their_name(preset):
    assert nanoquant_config(preset=preset).preset == preset


def test_presets_differ():
    plans = [dataclasses.replace(build(), preset="fast") for build in PRESETS.values()]
    assert all(plan != other for k, plan in enumerate(plans) for other in plans[k + 1 :])


def test_the_paper_preset_follows_the_publication():
    config = nanoquant_config(preset="paper")
    assert config.block.schedule == "published" and config.model.train == "scales"
    assert config.admm.iterations == 400 and config.admm.refit_sweeps == 0
    assert (config.block.dense_lr, config.block.latent_lr, config.block.dense_batch) == (
        1e-4,
        1e-5,
        4,
    )


def test_bits_are_asked_on_top_of_any_preset_and_budget():
    config = nanoquant_config(
        bits=0.8, preset="paper", budget=BudgetConfig(bits=2.0, rank_multiple=64)
    )
    assert config.budget == BudgetConfig(bits=0.8, rank_multiple=64)
    assert nanoquant_config().budget == BudgetConfig(allocation="measured")


def test_fields_replace_those_of_the_preset_and_nothing_else():
    config = nanoquant_config(run=RunConfig(seed=3))
    assert config == dataclasses.replace(nanoquant_config(), run=RunConfig(seed=3))


def test_a_dict_changes_fields_of_the_presets_stage():
    plain = nanoquant_config()
    config = nanoquant_config(bits=0.8, budget={"low": 0.7}, model={"optimizer": {"beta2": 0.9}})
    assert config.budget == dataclasses.replace(plain.budget, bits=0.8, low=0.7)
    optimizer = dataclasses.replace(plain.model.optimizer, beta2=0.9)
    assert config.model == dataclasses.replace(plain.model, optimizer=optimizer)
    with pytest.raises(TypeError, match="rank"):
        nanoquant_config(budget={"rank": 64})
    for wrong in (None, 1.0, RunConfig()):
        with pytest.raises(TypeError, match="budget must be a BudgetConfig or a dict"):
            nanoquant_config(budget=wrong)
    with pytest.raises(ValueError, match="low must lie in"):
        nanoquant_config(budget={"low": 2})


def test_a_configuration_is_plain_for_json():
    config = nanoquant_config(bits=0.55)
    assert json.loads(json.dumps(config.to_dict()))["budget"]["bits"] == 0.55


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        nanoquant_config().blocks = "0:1"


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        ("", range(8)),
        ("0:3", range(3)),
        ("2:", range(2, 8)),
        (":-6", range(2)),
        ("6:99", range(6, 8)),
        ("0:8:3", range(0, 8, 3)),
        ("::2", range(0, 8, 2)),
    ],
)
def test_blocks_are_a_slice(blocks, chosen):
    assert NanoQuantConfig(blocks=blocks).block_range(8) == chosen


@pytest.mark.parametrize("blocks", ["3", "a:b", "0:8:0", "7:0:-1", "0:8:1:1", "0-8", "1.5:"])
def test_blocks_that_are_no_slice_are_refused(blocks):
    with pytest.raises(ValueError, match="blocks must look like 0:10"):
        NanoQuantConfig(blocks=blocks)


@pytest.mark.parametrize("count", [1, 5])
def test_blocks_that_choose_nothing_are_refused(count):
    with pytest.raises(ValueError, match=rf"none of the {count}"):
        NanoQuantConfig(blocks="7:9").block_range(count)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    for build in (nanoquant_config, NanoQuantConfig):
        with pytest.raises(ValueError, match="fast, balanced, best, long, paper, got 'turbo'"):
            build(preset="turbo")


def test_values_out_of_range_are_refused_by_name():
    with pytest.raises(ValueError, match="bits must be above 0"):
        nanoquant_config(bits=0)
    with pytest.raises(ValueError, match="step must be prepare, convert or empty"):
        nanoquant_config(step="observe")
    for field in ("windows", "batch", "length"):
        with pytest.raises(ValueError, match=field):
            CalibrationConfig(**{field: 0})


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(TypeError, match="bit_width"):
        nanoquant_config(bit_width=1)


def test_every_field_says_what_it_is():
    import ast
    import inspect

    from nanoquant import config

    for item in ast.parse(inspect.getsource(config)).body:
        if not isinstance(item, ast.ClassDef):
            continue
        body = [node for node in item.body if not isinstance(node, ast.FunctionDef)]
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{item.name}.{node.target.id} has no docstring"


def test_options_that_would_change_nothing_are_refused_by_name():
    with pytest.raises(ValueError, match=r"budget.low and budget.allocation=uniform exclude"):
        BudgetConfig(low=0.7)
    with pytest.raises(ValueError, match=r"budget.roles and budget.allocation=measured exclude"):
        BudgetConfig(allocation="measured", roles=RoleWeights(q=0.5))
    with pytest.raises(ValueError, match=r"sensitivity.* and budget.allocation=prior exclude"):
        nanoquant_config(
            budget=BudgetConfig(allocation="prior"), sensitivity=SensitivityConfig(windows=3)
        )
