"""AdamW with narrow moments: the steps of the wide one, in a fraction of its memory."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nanoquant.optimizer import OptimizerConfig, adamw
from nanoquant.training import fit


class Distance(nn.Module):
    """Distance of a large matrix from noisy targets."""

    name = "distance"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, 128))

    def parameter_groups(self):
        return [{"params": [self.weight], "lr": 0.05}]

    def forward(self, batch):
        return (self.weight - batch).square().mean()


def trained(**settings):
    """The matrix after 12 steps."""
    objective = Distance()
    torch.manual_seed(0)
    batches = DataLoader(list(1 + torch.randn(12, 64, 128)), batch_size=None)
    fit(objective, batches, OptimizerConfig(**settings), epochs=1, precision="32-true")
    return objective.weight.detach()


@pytest.mark.parametrize("bits, tolerance", [(8, 0.02), (4, 0.25)])
def test_narrow_moments_take_nearly_the_steps_of_wide_ones(bits, tolerance):
    wide, narrow = trained(warmup=2), trained(warmup=2, state_bits=bits)
    assert not torch.equal(wide, narrow)
    assert (wide - narrow).norm() < tolerance * wide.norm()


def test_eight_bits_take_a_quarter_of_the_memory():
    def memory(bits):
        weight = nn.Parameter(torch.zeros(256, 256))
        optimizer = adamw([{"params": [weight], "lr": 0.1}], OptimizerConfig(state_bits=bits))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
        inner = (
            [getattr(m, n, m) for m in moments for n in ("codes", "scale")]
            if bits < 32
            else moments
        )
        return sum(t.numel() * t.element_size() for t in inner)

    assert memory(32) == 2 * 4 * 256 * 256
    assert memory(8) < 0.27 * memory(32)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="state_bits must be 32, 8 or 4, got 16"):
        OptimizerConfig(state_bits=16)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"epsilon": float("nan")}, "epsilon must be finite and at least 0, got nan"),
        ({"clip_norm": -1.0}, "clip_norm must be finite and at least 0, got -1.0"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"warmup": -1}, "warmup must be finite and at least 0, got -1"),
        ({"floor": 5.0}, "floor is a share of the first rate, 0 to 1, got 5.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_with_what_was_got(bad, words):
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**bad)
