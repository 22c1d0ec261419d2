"""Quantize tiny models on the CPU, on the far device, and there with visiting blocks: python far_runs.py OUT.json"""

import copy
import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import far_device  # noqa: F401
import torch
from tiny_models import VOCAB, tiny_gpt2, tiny_llama
from torch import nn
from torch.utils.data import DataLoader

from nanoquant import offload
from nanoquant.architectures import find_decoder
from nanoquant.config import nanoquant_config
from nanoquant.optimizer import OptimizerConfig
from nanoquant.quantize import quantize
from nanoquant.training import fit

FAR = torch.device("far")
TUNED = {"schedule": "grouped", "dense_epochs": 1, "refine_epochs": 1, "windows": 4}
KEPT = {"train": "scales", "kept_logits": 8, "recompute": True}
RUNS = {
    "tuned blocks": (tiny_llama, "uniform", "diagonal", TUNED, {"train": "none"}),
    "kept logits": (tiny_llama, "uniform", "both", {}, KEPT),
    "trained signs": (tiny_gpt2, "measured", "inputs", {}, {"train": "signs", "epochs": 2}),
}
LAYERS = 2
visits, most, here = Counter(), 0, set()


def config(allocation, curvature, block, model):
    """Of a run."""
    amounts = {"windows": 4, "held_out": 1, "batch": 1, "compile_from": None}
    return nanoquant_config(
        bits=2.0,
        budget={"allocation": allocation},
        importance={"curvature": curvature},
        admm={"iterations": 1, "power_iterations": 1},
        calibration={"windows": 4, "length": 16, "batch": 2},
        run={"precision": "32-true"},
        block=block,
        model=amounts | model,
    )


def follow_visits():
    """Count how often blocks come, and the most that are there at once."""
    arrive, leave = offload._arrive, offload._leave

    def arriving(block, visit):
        global most
        arrive(block, visit)
        here.add(id(block))
        most = max(most, len(here))
        visits["all"] += 1

    def leaving(block, visit, changes):
        leave(block, visit, changes)
        here.discard(id(block))

    offload._arrive, offload._leave = arriving, leaving


def compare(a, b):
    """Share of packed signs that differ, and the largest difference of all else relative to its largest value."""
    differing, total, largest = 0, 0, 0.0
    for (name, one), other in zip(a.items(), b.values(), strict=True):
        one, other = one.cpu(), other.cpu()
        if name.endswith("_signs"):
            differing += int((one != other).sum())
            total += one.numel()
        else:
            gap = (one.float() - other.float()).abs().max() / one.float().abs().max()
            largest = max(largest, float(gap))
    return differing / total, largest


class Spoilt(nn.Module):
    """An objective that is never finite."""

    name = "spoilt"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, device=FAR))

    def parameter_groups(self):
        return [{"params": [self.weight], "lr": 0.1}]

    def forward(self, batch):
        return self.weight.sum() * float("nan")


def given_up():
    """Device of an objective whose training was given up."""
    objective = Spoilt()
    with suppress(FloatingPointError):
        fit(objective, DataLoader([0]), OptimizerConfig(), epochs=1, precision="32-true")
    return objective.weight.device.type


def main(out):
    tokens = torch.randint(0, VOCAB, (16 * 12,), generator=torch.Generator().manual_seed(0))
    follow_visits()
    found = {}
    for name, (family, *stages) in RUNS.items():
        models = [family(layers=LAYERS)]
        models += [copy.deepcopy(models[0]) for _ in range(2)]
        models[1].to(FAR)
        offload.offload(models[2], find_decoder(models[2]).blocks, FAR)
        before = visits["all"]
        for model in models:
            quantize(model, tokens, config(*stages))
        states = [model.state_dict() for model in models]
        found[name] = {
            "devices": sorted({t.device.type for state in states[1:] for t in state.values()}),
            "from the CPU": compare(states[0], states[1]),
            "visiting": compare(states[1], states[2]),
            "visits": visits["all"] - before,
        }
    Path(out).write_text(json.dumps({"runs": found, "at once": most, "given up": given_up()}))


main(sys.argv[1])
