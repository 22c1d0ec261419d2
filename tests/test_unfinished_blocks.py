"""What comes before the whole-model phase is kept piece by piece: a kill loses the block at work, nothing else.

Calibration's gradient is kept at every block here, because ``save_every`` is 0.
"""

import dataclasses
import functools
import math

import pytest
import torch
from safetensors.torch import load_file
from test_mapped import is_mapped
from test_unfinished import QUICK, killed, run
from tiny_models import tiny_llama

from nanoquant import phases, tensor_file
from nanoquant.block_config import BlockConfig
from nanoquant.importance import ImportanceConfig
from nanoquant.importance_store import as_tensors
from nanoquant.mapped import forget
from nanoquant.model_reconstruction import ModelReconstructor, quantized_layers
from nanoquant.self_text import SelfTextConfig
from nanoquant.tensor_file import TensorFile
from nanoquant.training import RunConfig
from nanoquant.unfinished import MAPPED, Unfinished

TUNED = dataclasses.replace(
    QUICK,
    importance=ImportanceConfig(curvature="both"),
    block=BlockConfig(
        schedule="algorithm1",  # two trainings a block
        dense_epochs=1,
        refine_epochs=1,
        windows=4,
        latent_lr=1e-2,
        scale_lr=1e-2,
    ),
    model=dataclasses.replace(QUICK.model, epochs=2),
)

UNTUNED = dataclasses.replace(TUNED, block=QUICK.block)


@pytest.fixture(scope="module")
def uninterrupted():
    """Runs that nobody killed, by what they train."""
    return functools.cache(lambda train: run(None, trains(train), model=tiny_llama(layers=4)))


def trains(train):
    return dataclasses.replace(TUNED, model=dataclasses.replace(TUNED.model, train=train))


@pytest.mark.parametrize(
    ("phase", "at", "left", "train"),
    [
        ("calibrate", 0, [11, 4], "signs"),
        ("calibrate", 5, [5, 4], "signs"),
        ("calibrate", 9, [0, 4], "scales"),
        ("ranks", 3, [0, 4], "none"),
        ("blocks", 0, [0, 3], "scales"),
        ("blocks", 2, [0, 1], "signs"),
        ("blocks", 2, [0, 1], "scales"),
        ("blocks", 2, [0, 1], "none"),
    ],
)
def test_a_run_that_is_killed_before_the_model_phase_loses_the_block_at_work(
    phase, at, left, train, tmp_path, uninterrupted
):
    """``left``: passes of calibration and blocks made after the kill, which comes when its block is kept.

    Calibration runs 3 blocks forward, then 4 forward and backward; a kill repeats the forward passes it needs.
    """
    config, (expected, whole, _) = trains(train), uninterrupted(train)
    killed(tmp_path, at, phase=phase, config=config, model=tiny_llama(layers=4))
    found, report, counts = run(tmp_path, config, model=tiny_llama(layers=4))
    assert [counts.get(name, [0])[0] for name in ("calibrate", "blocks")] == left
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert report.blocks == whole.blocks and report.ranks == whole.ranks


@pytest.mark.parametrize(
    ("written", "at", "left"),
    [((), 7, 11), ((3,), 7, 8), ((3,), 5, 8), ((2,), 7, 5), ((3, 1), 7, 2)],
    ids=str,
)
def test_a_kill_between_two_copies_of_the_gradient_calibrates_again_to_the_same_bits(
    written, at, left, tmp_path, monkeypatch
):
    """``written``: blocks whose gradient is kept; ``at``, ``left``: passes before and after the kill, as above."""
    expected, whole, _ = run(None, UNTUNED, model=tiny_llama(layers=4))
    config = dataclasses.replace(UNTUNED, run=RunConfig(save_every=60))
    keep, given = Unfinished.keep_calibrated, {}

    def kept(self, b, chosen, importances, gradient):
        self.gradient.written = -math.inf if b in written else math.inf
        given[b] = as_tensors(importances)[0]
        keep(self, b, chosen, importances, gradient)

    monkeypatch.setattr(Unfinished, "keep_calibrated", kept)
    killed(tmp_path, at, phase="calibrate", config=config, model=tiny_llama(layers=4))
    assert (tmp_path / "unfinished-gradient.safetensors").is_file() == bool(written)
    begun, before = min(written, default=4), dict(given)
    given.clear()
    found, report, counts = run(tmp_path, config, model=tiny_llama(layers=4))
    assert counts["calibrate"] == [left, left] and given.keys() == set(range(begun))
    for b in before.keys() & given.keys():
        assert all(torch.equal(given[b][name], tensor) for name, tensor in before[b].items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert report.blocks == whole.blocks and report.ranks == whole.ranks


@pytest.mark.parametrize(("seconds", "writes"), [(0, 3), (3600, 0)])
def test_the_gradient_is_written_when_its_copy_is_old_enough(
    seconds, writes, tmp_path, monkeypatch
):
    found, write = [], TensorFile.write

    def count(self, tensors, values=None):
        found.extend([self.path] * ("gradient" in tensors))
        write(self, tensors, values)

    monkeypatch.setattr(TensorFile, "write", count)
    config = dataclasses.replace(UNTUNED, run=RunConfig(save_every=seconds))
    killed(tmp_path, 0, phase="ranks", config=config, model=tiny_llama(layers=4))
    assert len(found) == writes


def test_what_linears_share_is_kept_once(tmp_path):
    killed(tmp_path, 0, phase="blocks", config=TUNED)
    for b in range(2):
        tensors = load_file(tmp_path / f"unfinished-importance-{b:03}.safetensors")
        # 4 inputs of a block, and gradients at 7 linears
        assert sum(name.endswith(".Q") for name in tensors) == 4 + 7


@pytest.mark.parametrize("step", [0, 5])
def test_a_block_that_is_lost_is_made_again_as_it_was(step, tmp_path):
    expected, _, _ = run(None, TUNED)
    killed(tmp_path, step, config=TUNED)
    block = tmp_path / "unfinished-block-000.safetensors"
    block.write_bytes(block.read_bytes()[:1000])
    with pytest.raises(ValueError, match="delete it, and block 0 will be made anew"):
        run(tmp_path, TUNED)
    block.unlink()
    found, _, _ = run(tmp_path, TUNED)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_block_of_other_ranks_than_are_chosen_now_is_refused(tmp_path, monkeypatch):
    killed(tmp_path, 0, phase="blocks", config=TUNED)
    choose = phases.choose_sizes

    def other(*arguments):
        choice = choose(*arguments)
        return dataclasses.replace(choice, sizes={n: r + 8 for n, r in choice.sizes.items()})

    monkeypatch.setattr(phases, "choose_sizes", other)
    with pytest.raises(
        ValueError, match="block-000.* was made with other ranks than losses give now"
    ):
        run(tmp_path, TUNED)


@pytest.mark.parametrize("kill", [None, 0])
@pytest.mark.parametrize("train", ["signs", "scales", "none"])
def test_finished_blocks_live_in_their_files_and_nothing_writes_there(
    train, kill, tmp_path, monkeypatch
):
    """Signs that are forgotten at any moment are read again from the file, so a write to them would be lost."""
    config = dataclasses.replace(QUICK, model=dataclasses.replace(QUICK.model, train=train))
    expected, whole, _ = run(None, config)
    if kill is not None and train != "none":
        killed(tmp_path, kill, config=config)
    seen = []

    def signs(model):
        layers = quantized_layers(model).values()
        return [t for m in layers for part, t in m.state_dict().items() if part in MAPPED]

    plain, train_objective = ModelReconstructor.forward, ModelReconstructor.train_objective

    def forward(self, student, *arguments, **settings):
        seen.extend(is_mapped(tensor) for tensor in signs(student))
        return plain(self, student, *arguments, **settings)

    def trained(self, objective, *arguments):
        forget(objective.student.state_dict().values())
        groups = objective.parameter_groups()
        assert not any(is_mapped(p) for group in groups for p in group["params"])
        train_objective(self, objective, *arguments)
        forget(objective.student.state_dict().values())

    monkeypatch.setattr(ModelReconstructor, "forward", forward)
    monkeypatch.setattr(ModelReconstructor, "train_objective", trained)
    found, report, _ = run(tmp_path, config)
    assert len(seen) == (0 if train == "none" else 28) and all(seen)
    assert report.model == whole.model and report.blocks == whole.blocks
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_importances_that_are_lost_are_made_again_as_they_were(tmp_path):
    expected, _, _ = run(None, TUNED)
    killed(tmp_path, 0, phase="blocks", config=TUNED)
    (tmp_path / "unfinished-importance-001.safetensors").unlink()
    found, _, counts = run(tmp_path, TUNED)
    assert counts["calibrate"] == [5, 5]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_disk_that_is_full_in_the_middle_of_calibration_ends_a_run_that_goes_on(
    tmp_path, monkeypatch
):
    expected, _, _ = run(None, TUNED)
    write = tensor_file.save_file

    def full(tensors, path, metadata):
        if "importance-000" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "save_file", full)
        with pytest.raises(OSError, match="importance-000"):
            run(tmp_path, TUNED)
    found, _, counts = run(tmp_path, TUNED)
    assert counts["calibrate"] == [2, 2]  # one block, forward and backward
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_where_activations_lie_changes_nothing(tmp_path):
    runs = [dataclasses.replace(TUNED.run, activation_memory=at) for at in (None, "1B", "9kB")]
    found = []
    for n, settings in enumerate(runs):
        config = dataclasses.replace(TUNED, run=settings)
        found.append(run(tmp_path / str(n), config, model=tiny_llama(layers=3)))
        importances = [
            load_file(tmp_path / str(n) / f"unfinished-importance-{b:03}.safetensors")
            for b in range(3)
        ]
        found[-1] = (*found[-1], importances)
        assert not [p for p in (tmp_path / str(n)).iterdir() if "unfinished" not in p.name]
    (expected, report, _, known), *others = found
    for tensors, other, _, importances in others:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
        assert other.blocks == report.blocks
        for one, two in zip(known, importances, strict=True):
            assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    killed(tmp_path / "killed", 4, phase="calibrate", config=TUNED, model=tiny_llama(layers=3))
    changed = dataclasses.replace(TUNED, run=runs[1])
    tensors, *_ = run(tmp_path / "killed", changed, model=tiny_llama(layers=3))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_what_decides_no_result_may_change_where_a_run_goes_on(tmp_path):
    expected, _, _ = run(None)
    killed(tmp_path, 20)
    model = dataclasses.replace(QUICK.model, recompute=True)
    other = {"run": RunConfig(save_every=60), "model": model, "self_text": SelfTextConfig(batch=4)}
    found, _, counts = run(tmp_path, dataclasses.replace(QUICK, **other))
    assert counts["model"] == [24, 24]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
