"""One loop trains any objective, follows its schedule, and undoes what turns non-finite."""

import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nanoquant.fit_result import FitResult
from nanoquant.non_finite import StaysNonFiniteError, first_non_finite
from nanoquant.optimizer import OptimizerConfig
from nanoquant.training import Reconstruction, fit


class Regression(nn.Module):
    """Distance of a weight from batches of targets; some steps can be spoilt."""

    name = "block 3 refine"

    def __init__(self, lr=0.1, spoil=(), how="loss"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.lr, self.spoil, self.how, self.calls, self.seen = lr, set(spoil), how, 0, []

    def parameter_groups(self):
        return [{"params": [self.weight], "lr": self.lr}]

    def forward(self, batch):
        self.seen.append(self.weight.detach().clone())
        loss = (self.weight - batch).square().mean()
        if self.calls in self.spoil:
            if self.how == "loss":
                loss = loss * float("nan")
            else:  # finite loss, infinite gradient
                loss = loss + (self.weight - self.weight.detach()).abs().sum().sqrt()
        self.calls += 1
        return loss


def batches(count):
    return DataLoader([torch.ones(4)] * count, batch_size=None, generator=torch.Generator())


def run(objective, steps, config=None, epochs=1, **kwargs):
    config = config or OptimizerConfig()
    return fit(objective, batches(steps), config, epochs=epochs, precision="32-true", **kwargs)


def test_fit_lowers_the_loss_and_returns_every_loss():
    objective = Regression()
    result = run(objective, 20, epochs=2)
    assert isinstance(result, FitResult) and len(result.losses) == 40 and result.undone == 0
    assert result.losses[-1] < 0.1 * result.losses[0]


def test_fit_takes_the_steps_of_adamw_with_the_schedule():
    objective, config = Regression(), OptimizerConfig(floor=0.1, warmup=2, weight_decay=0.01)
    run(objective, 8, config)
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 * config.rate(step, 8)
        optimizer.zero_grad()
        (weight - 1).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(objective.weight, weight)


def test_rate_warms_up_linearly_then_falls_as_a_cosine_to_the_floor():
    config = OptimizerConfig(warmup=3, floor=0.1)
    assert [config.rate(step, 13) for step in range(3)] == [0.25, 0.5, 0.75]
    assert config.rate(3, 13) == 1
    assert config.rate(8, 13) == pytest.approx(0.55)
    assert config.rate(13, 13) == pytest.approx(0.1)
    assert config.rate(5, 13) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.2)))


def test_clipping_bounds_the_norm_of_all_gradients():
    free, clipped = Regression(), Regression()
    run(free, 1, OptimizerConfig(epsilon=1.0, beta2=0.0))
    run(clipped, 1, OptimizerConfig(epsilon=1.0, beta2=0.0, clip_norm=0.1))
    torch.testing.assert_close(free.weight, torch.full((4,), 0.1 * 0.5 / 1.5))  # g / (|g| + 1)
    torch.testing.assert_close(clipped.weight, torch.full((4,), 0.1 * 0.05 / 1.05))


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_turns_non_finite_is_undone_and_named(how, caplog):
    objective = Regression(spoil=[5], how=how)
    with caplog.at_level(logging.WARNING, "nanoquant.training"):
        result = run(objective, 20)
    assert result.undone == 1
    assert "block 3 refine" in caplog.text and "step 5" in caplog.text
    assert {"loss": "last good", "gradient": "step is undone"}[how] in caplog.text
    assert objective.weight.isfinite().all()
    assert result.losses[-1] < result.losses[0]


def test_undoing_returns_to_the_last_good_values():
    objective = Regression(spoil=[5])
    run(objective, 20)
    assert torch.equal(
        objective.seen[7], objective.seen[0]
    )  # 6 looked for the layer; values are kept every 16 steps


def test_undoing_forgets_the_moments_that_led_away():
    objective = Regression(spoil=[5])
    run(objective, 7)
    first, after = objective.seen[1] - objective.seen[0], objective.weight - objective.seen[7]
    share = OptimizerConfig().rate(6, 7)  # a fresh Adam takes a step of exactly the rate
    torch.testing.assert_close(after, first * share, rtol=0.2, atol=0)


def test_a_bad_gradient_costs_its_own_step_only():
    objective = Regression(spoil=[5], how="gradient")
    run(objective, 20)
    assert torch.equal(objective.seen[6], objective.seen[5])


def test_gradients_whose_norm_overflows_are_dropped_and_counted(caplog):
    class Steep(Regression):
        def forward(self, batch):
            return super().forward(batch) * (1e25 if len(self.seen) == 6 else 1)

    objective = Steep()
    result = run(objective, 20)
    assert (len(result.losses), result.undone) == (20, 1)
    assert "the norm of all of them" in caplog.text


def test_fit_gives_up_when_steps_stay_non_finite():
    objective = Regression(spoil=range(2, 100))
    with pytest.raises(StaysNonFiniteError, match=r"block 3 refine.*lower its learning rate") as no:
        run(objective, 20)
    assert no.value.undone == Reconstruction.most_undone + 1


def test_what_a_snapshot_keeps_is_what_undoing_returns_to():
    kept = {}

    def keep(module):
        kept[module.step] = module.objective.weight.detach().clone()
        assert torch.equal(kept[module.step], module.good[0])

    objective = Regression(spoil=[16])  # where a snapshot was due
    run(objective, 40, at_snapshot=keep)
    assert list(kept) == [0, 32]
    assert torch.equal(objective.seen[18], kept[0])  # 17 looked for the layer


def test_an_interruption_stays_one():
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Regression(), 2, on_step=interrupt)


def test_a_start_that_is_not_finite_is_an_error_that_names_the_parameter():
    objective = Regression()
    objective.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"first in weight"):
        run(objective, 20)


def test_the_layer_whose_output_is_not_finite_is_named():
    class Layers(Regression):
        def __init__(self):
            super().__init__(spoil=[3])
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, batch):
            calls = self.calls
            batch = self.second(self.first(batch) * (float("nan") if calls in self.spoil else 1.0))
            self.calls += 1
            return (self.weight - batch).square().mean()

    objective = Layers()
    batch, objective.calls = torch.ones(4), 3
    assert first_non_finite(objective, batch) == "second"


def test_on_step_gets_every_step_and_its_loss():
    seen = []
    result = run(Regression(), 7, on_step=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == list(range(7))
    assert [loss for _, loss in seen] == result.losses


def test_loggers_get_the_loss_under_the_name_of_the_objective(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="run", version=0)
    result = run(Regression(), 4, loggers=[logger])
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "block 3 refine/loss" in text[0] and len(text) == 1 + len(result.losses)


def test_dropout_stays_off():
    class Modes(Regression):
        def forward(self, batch):
            modes.append(self.training)
            return super().forward(batch)

    modes = []
    run(Modes().train(), 3)
    assert modes == [False] * 3


def test_fit_leaves_random_numbers_and_lightnings_messages_alone():
    state, level = torch.random.get_rng_state(), logging.getLogger("lightning.pytorch").level
    run(Regression(), 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert logging.getLogger("lightning.pytorch").level == level


def test_fit_prints_nothing(capfd):
    run(Regression(), 3)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.mark.parametrize(
    "changes",
    [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": -1.0}, {"weight_decay": -1.0}, {"warmup": -1}],
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimizerConfig(**changes)
