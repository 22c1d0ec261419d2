"""A phase of a block ends when held-out windows no longer gain, in the state that was best for them."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from test_block_reconstruction import BRISK, INITIALIZE_ONLY, block_loss, prepare, reconstruct
from torch import nn

from nanoquant import block_tuning
from nanoquant.block_config import BlockConfig
from nanoquant.block_tuning import BlockData, BlockObjective
from nanoquant.early_stop import EarlyStop
from nanoquant.non_finite import StaysNonFiniteError

NAN = float("nan")


def drive(losses, patience):
    """Value of the parameter after a training that sets it to 1, 2, ... and measures ``losses``, and its epochs."""
    parameter, measured = nn.Parameter(torch.zeros(1)), iter(losses)
    stop = EarlyStop([parameter], lambda: next(measured), patience)
    trainer = SimpleNamespace(should_stop=False)
    epochs = 0
    while not trainer.should_stop and epochs < len(losses) - 1:
        epochs += 1
        parameter.data.fill_(float(epochs))
        stop.on_train_epoch_end(trainer, None)
    stop.restore()
    return float(parameter.detach()), epochs


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([5, 4, 3, 3.5, 1], 1, (2, 3)),  # the first epoch without gain ends it
        ([5, 4, 3, 3.5, 1], 2, (4, 4)),  # one such epoch is borne
        ([5, 6, 7, 4], 2, (0, 2)),  # the untouched state may be the best
        ([5, 5, 5], 1, (0, 1)),  # equal is not lower
        ([5, NAN, 4, 3], 2, (3, 3)),
        ([5, NAN, NAN], 2, (0, 2)),
        ([NAN, 4, 5], 2, (1, 2)),
        ([NAN, NAN, NAN], 2, (1, 1)),  # no finite loss: nothing to put back
    ],
)
def test_the_best_state_is_kept_and_patience_counts_epochs_in_a_row(losses, patience, expected):
    assert drive(losses, patience) == expected


def held_out_loss(setup, count):
    """Loss of the last windows."""
    data = setup.data
    own = BlockData(data.inputs[-count:], data.targets[-count:], data.call)
    return block_loss(SimpleNamespace(**vars(setup) | {"data": own}))


def test_a_ruinous_rate_is_stopped_early_and_leaves_the_held_out_loss_no_worse():
    ruin = {"refine_epochs": 6, "latent_lr": 50.0, "scale_lr": 5.0, "relative_rates": True}
    config = dataclasses.replace(INITIALIZE_ONLY, schedule="algorithm1", **ruin)
    plain, free, stopped = prepare(), prepare(), prepare()
    reconstruct(plain, INITIALIZE_ONLY)
    reconstruct(free, config)
    reconstruct(stopped, dataclasses.replace(config, held_out=1))
    limit = held_out_loss(plain, 1) * 1.0001
    assert held_out_loss(stopped, 1) <= limit < held_out_loss(free, 1)


def test_a_good_rate_gains_on_windows_that_do_not_train(monkeypatch):
    seen = []
    fit = block_tuning.fit

    def record(objective, loader, *args, **kwargs):
        data = loader.dataset
        seen.append(torch.stack([data[k][0] for k in range(len(data))]))
        result = fit(objective, loader, *args, **kwargs)
        assert result.epochs * len(loader) == len(result.losses)
        return result

    monkeypatch.setattr(block_tuning, "fit", record)
    plain, tuned = prepare(), prepare()
    reconstruct(plain, INITIALIZE_ONLY)
    config = dataclasses.replace(INITIALIZE_ONLY, refine_epochs=4, held_out=1, **BRISK)
    reconstruct(tuned, config)
    assert held_out_loss(tuned, 1) < held_out_loss(plain, 1)
    assert all(torch.equal(windows, tuned.data.inputs[:-1]) for windows in seen)


def test_a_phase_that_breaks_down_ends_in_its_best_state_where_windows_are_held_out(
    monkeypatch, caplog
):
    forward = BlockObjective.forward

    def breaking(objective, batch):
        loss = forward(objective, batch)
        good = not torch.is_grad_enabled() or next(steps) < 4
        return loss if good else loss * NAN

    monkeypatch.setattr(BlockObjective, "forward", breaking)
    joint = {"schedule": "algorithm1", "refine_epochs": 4, **BRISK}
    config, plain, tuned = dataclasses.replace(INITIALIZE_ONLY, **joint), prepare(), prepare()
    reconstruct(plain, INITIALIZE_ONLY)
    steps = itertools.count()
    report = reconstruct(tuned, dataclasses.replace(config, held_out=1, patience=9))
    assert "in its best state on held-out windows" in caplog.text and report.undone == 4
    assert held_out_loss(tuned, 1) < held_out_loss(plain, 1)
    steps = itertools.count()
    with pytest.raises(StaysNonFiniteError):
        reconstruct(prepare(), config)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"held_out": -1}, "not be negative, got -1"),
        ({"held_out": 16}, "one of windows=16 to train on"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"patience": 2}, "patience=2 and held_out=0 exclude each other"),
        ({"held_out": 2, "dense_epochs": 0, "refine_epochs": 0}, "exclude each other"),
    ],
)
def test_settings_that_can_not_work_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        BlockConfig(**bad)


def test_data_with_no_window_left_to_train_on_is_refused():
    config = dataclasses.replace(INITIALIZE_ONLY, windows=16, refine_epochs=1, held_out=4)
    with pytest.raises(ValueError, match="held_out=4 leaves none of 4 windows"):
        reconstruct(prepare(), config)
