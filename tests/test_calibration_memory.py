"""Memory of all that comes before the blocks grows neither by the weights of a model nor by their statistics."""

import subprocess
import sys

import pytest
import torch
from tiny_models import random_windows, tiny_llama

CODE = """
import sys
import torch
from nanoquant.config import nanoquant_config
from nanoquant.memory import forget_peaks, peak_bytes
from nanoquant.progress import Progress
from nanoquant.quantize import quantize
from nanoquant.sources import load_model
from pathlib import Path

class Tell(Progress):
    def begin(self, name, total):
        if name == "blocks":
            print(peak_bytes()["memory_bytes"])
            raise SystemExit

folder = Path(sys.argv[1])
config = nanoquant_config(
    calibration={"windows": 16, "length": 64},
    block={"windows": 16},
    budget={"allocation": "uniform"},
    importance={"curvature": "inputs"},
    model={"train": "none"},
    run={"activation_memory": "1MB"},
)
model = load_model(folder / "dense", torch.device("cpu"), trainable=True)
forget_peaks()
quantize(model, torch.load(folder / "tokens"), config, progress=Tell(), work=folder / "work")
"""


def peak(folder, layers):
    """Most memory of quantize up to its first block, and bytes of the model's weights."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_key_value_heads": 4}
    model = tiny_llama(layers=layers, dtype=torch.bfloat16, **sizes)
    model.save_pretrained(folder / "dense")
    torch.save(random_windows(64, 64).flatten(), folder / "tokens")
    run = [sys.executable, "-c", CODE, folder]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), sum(p.nbytes for p in model.parameters())


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_model(tmp_path):
    few, small = peak(tmp_path / "few", 12)
    many, large = peak(tmp_path / "many", 36)
    # weights grow by 126 MB, correlations by 176 MB, activations by 50 MB
    assert large - small > 120e6
    assert many - few < 30e6, (few, many)
