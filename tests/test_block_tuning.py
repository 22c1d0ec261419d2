"""What tunes a block is let go of when its phase ends, without waiting for Python to look for cycles."""

import gc
import weakref

import pytest
from tiny_models import random_windows, tiny_llama

from nanoquant import training
from nanoquant.config import nanoquant_config
from nanoquant.progress import Progress
from nanoquant.quantize import quantize

CONFIG = nanoquant_config(
    2.0,
    budget={"allocation": "uniform", "rank_multiple": 8},
    calibration={"windows": 4, "length": 16},
    admm={"iterations": 2},
    block={"schedule": "grouped", "dense_epochs": 1, "refine_epochs": 1, "windows": 2},
    model={"train": "none"},
)


@pytest.fixture
def no_collector():
    """Cycles stay unless somebody asks for them to be collected."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_neither_trainers_nor_weights_of_earlier_blocks_stay_alive(no_collector, monkeypatch):
    loops, weights, earlier, counts = [], [], [0], []
    plain = training.Reconstruction.__init__

    def watched(self, objective, *arguments):
        plain(self, objective, *arguments)
        loops.append(weakref.ref(self))
        trained = [p for group in objective.parameter_groups() for p in group["params"]]
        weights.extend(weakref.ref(p) for p in trained if p.dim() == 2)  # not scales, which stay

    class Look(Progress):
        def advance(self, done, note=""):
            if not loops:
                return
            assert not [loop for loop in loops if loop() is not None]
            assert not [weight for weight in weights[: earlier[0]] if weight() is not None]
            earlier[0] = len(weights)
            counts.append(len(loops))

    monkeypatch.setattr(training.Reconstruction, "__init__", watched)
    quantize(tiny_llama(layers=4), random_windows(8, 16).flatten(), CONFIG, progress=Look())
    assert counts[:4] == [8, 16, 24, 32]  # two phases of each of four groups
