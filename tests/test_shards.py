"""Processes that divide latents, gradients, moments and copies hold a part each, and give what one process gives."""

import shutil

import launch
import pytest
import torch
import two_shards
from test_processes import worst
from tiny_models import FAMILIES
from torch import distributed as dist

from nanoquant import model_reconstruction
from nanoquant.model_config import ModelConfig
from nanoquant.optimizer import OptimizerConfig

ROUNDING = 1e-6
"""Largest difference, relative or in nats, after some dozen float32 steps."""
NO_GRADIENT = ("k_proj.bias", "c_attn.bias")
"""Attention does not depend on biases of keys, so that these follow the rounding of a gradient of 0."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folder, and what each of two processes has computed."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch.two(two_shards.__file__, folder, *two_shards.CASES, timeout=600)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in this process, with as many threads as one of them has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = [name for name in two_shards.CASES if name not in ("full", "compiled")]
    yield two_shards.cases(tmp_path_factory.mktemp("one"), names)
    torch.set_num_threads(threads)


def assert_same(one, two, tolerance=ROUNDING):
    """No sign differs, and all else by rounding."""
    signs, scales = worst(one["tensors"], two["tensors"])
    assert signs == 0 and scales <= tolerance
    for name in ("losses", "held out"):
        assert one[name] == pytest.approx(two[name], rel=tolerance, abs=tolerance)
    assert one["undone"] == two["undone"]


@pytest.fixture
def group_of_one(tmp_path, monkeypatch):
    """A process group of this process alone, in which models are divided all the same."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setattr(model_reconstruction, "world_size", lambda: 2)
    yield
    dist.destroy_process_group()


def test_a_model_whose_one_part_is_all_of_it_trains_bit_for_bit_as_it_does_whole(
    group_of_one, monkeypatch
):
    divided = two_shards.held()
    monkeypatch.undo()
    found = two_shards.held()
    assert found.pop("whole") > 0 and divided.pop("whole") == 0
    assert found == divided


def test_shards_are_kept_and_go_on_in_a_process_that_has_all(group_of_one, tmp_path, monkeypatch):
    assert two_shards.quantized(tmp_path / "work", kill=20) is None
    monkeypatch.undo()
    found, expected = (two_shards.quantized(folder) for folder in (tmp_path / "work", None))
    assert found["counts"]["model"] == [24, 24]
    assert_same(expected, found, 0)


def test_blocks_that_visited_a_device_are_divided_as_they_settle_there(group_of_one, monkeypatch):
    found = two_shards.quantized(None, visiting=True)
    monkeypatch.undo()
    assert_same(two_shards.quantized(None), found, 0)


def test_codebooks_are_divided_as_latents_are(group_of_one, monkeypatch):
    found = two_shards.looked_up()
    monkeypatch.undo()
    expected = two_shards.looked_up(shard=False)
    assert expected["losses"][-1] < expected["losses"][0]
    assert_same(expected, found, 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["trained", "quantized", "looked up"])
def test_two_processes_give_what_one_gives(both, alone, case):
    for found in both[1]:
        assert_same(alone[case], found[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_can_be_divided(both, alone, case):
    """Norms of small gradients differ by 2e-5, and so they do where processes hold copies."""
    one, two = ({**found[case]} for found in (alone, both[1][0]))
    for found in (one, two):
        found["tensors"] = {
            n: t for n, t in found["tensors"].items() if not n.endswith(NO_GRADIENT)
        }
    assert_same(one, two, 1e-4)
    assert two["losses"] == pytest.approx(one["losses"], rel=ROUNDING)


@pytest.mark.slow
def test_bfloat16_models_differ_by_its_rounding_from_one_process_and_not_from_copies(both, alone):
    one, two, copies = alone["bfloat16"], *(both[1][0][case] for case in ("bfloat16", "copies"))
    signs, _ = worst(one["tensors"], two["tensors"])
    assert signs < 1e-3 and two["losses"] == pytest.approx(one["losses"], rel=2**-8)
    assert_same(copies, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in two_shards.CASES if case not in ("held", "full")]
)
def test_both_processes_end_with_the_same_model(both, case):
    first, second = (found[case] for found in both[1])
    assert_same(first, second, 0)


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_what_trains_and_nothing_whole(both, alone):
    one = alone["held"]["bytes"]
    assert set(one) == {"parameters", "gradients", "moments", "best state", "last good state"}
    assert one["moments"] == 2 * one["parameters"]
    for found in both[1]:
        assert found["held"]["whole"] == 0
        assert found["held"]["bytes"] == {kind: size / 2 for kind, size in one.items()}


@pytest.mark.slow
def test_records_are_those_of_one_process_and_of_all_shards(both, alone):
    records = both[1][0]["held"]["records"]
    assert any("flips" in metrics for _, metrics in records)
    for (phase, one), (other, two) in zip(alone["held"]["records"], records, strict=True):
        assert (phase, one.keys()) == (other, two.keys())
        for name, value in one.items():
            assert two[name] == (value if name == "layer" else pytest.approx(value, rel=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["loss", "gradient"])
def test_a_step_that_one_process_spoils_is_undone_in_both(both, alone, case):
    assert alone[case]["undone"] == 1
    for found in both[1]:
        assert_same(alone[case], found[case])


@pytest.mark.slow
def test_blocks_are_compiled_as_well(both, alone):
    for found in both[1]:
        assert found["compiled"]["graphs"] > 0
        assert_same(alone["trained"], found["compiled"])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_two_processes_and_with_one(both, alone, tmp_path):
    folder, found = both
    for case in found:
        assert case["killed"]["counts"]["model"] == [24, 24]  # of 40; the copy is of the 16th
        assert_same(alone["quantized"], case["killed"])
        assert_same(case["quantized"], case["killed"], 0)
    left = shutil.copytree(folder / "left", tmp_path / "left")
    one = two_shards.quantized(left, shard=False)
    assert one["counts"]["model"] == [24, 24]
    assert_same(alone["quantized"], one)


@pytest.mark.slow
def test_a_disk_that_is_full_ends_all_processes_with_its_message(both):
    for found in both[1]:
        assert "unfinished-model.safetensors can't be written" in found["full"]


@pytest.mark.parametrize(
    "changes",
    [{"train": "scales"}, {"train": "none"}, {"optimizer": OptimizerConfig(state_bits=8)}],
    ids=str,
)
def test_what_can_not_be_divided_is_refused_by_name(changes):
    with pytest.raises(ValueError, match=r"shard .* take train='signs' and 32 bits"):
        ModelConfig(shard=True, **changes)
