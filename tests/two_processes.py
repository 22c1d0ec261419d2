"""What two processes compute in tests, and one as well: ``torchrun --nproc-per-node 2 two_processes.py FOLDER``."""

import sys
from pathlib import Path

import torch
from tiny_models import random_windows, tiny_llama
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nanoquant import processes
from nanoquant.config import nanoquant_config
from nanoquant.optimizer import OptimizerConfig
from nanoquant.quantize import quantize
from nanoquant.training import fit

SMALL = {
    "budget": {"rank_multiple": 8},
    "calibration": {"windows": 6, "length": 16},
    "sensitivity": {"iterations": 4, "length": 8},
    "admm": {"iterations": 6},
}
TUNED = {
    "schedule": "grouped",
    "windows": 6,
    "held_out": 1,
    "dense_epochs": 2,
    "dense_batch": 3,
    "refine_epochs": 2,
    "refine_batch": 2,
    "relative_rates": True,
    "latent_lr": 1e-3,
    "scale_lr": 1e-3,
}
MODEL = {"windows": 9, "batch": 4, "epochs": 3, "held_out": 3, "latent_lr": 3e-3}
KEPT = {"block": TUNED, "model": MODEL | {"kept_logits": 8, "recompute": True}}


def quantized(work=None, **stages):
    """Packed tensors, held-out divergences and losses of a tiny model."""
    model = tiny_llama(layers=3)
    config = nanoquant_config(1.0, **SMALL, **stages)
    report = quantize(model, random_windows(40, 16).flatten(), config, work=work)
    found = {"held out": report.model.held_out, "losses": report.model.losses}
    return {"tensors": dict(model.state_dict()), "ranks": report.ranks, **found}


class Spoilt(nn.Module):
    """Distance of a weight from its targets; one of them is not finite."""

    name = "spoilt"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def parameter_groups(self):
        return [{"params": [self.weight], "lr": 0.1}]

    def forward(self, batch):
        return (self.weight - batch[0]).square().mean()


def spoilt():
    """Weight, losses and steps undone where one sample of one process is not finite."""
    targets = torch.randn(23, 4, generator=torch.manual_seed(0))
    targets[6, 1] = float("nan")  # of the second process
    objective = Spoilt()
    loader = DataLoader(TensorDataset(targets), batch_size=4)
    result = fit(objective, loader, OptimizerConfig(), epochs=2, precision="32-true")
    return {
        "weight": objective.weight.detach(),
        "losses": result.losses,
        "undone": result.undone,
    }


def exchanged():
    """What the ways to exchange values give to this process."""
    shared = torch.arange(3.0).bfloat16()
    sent = processes.broadcast({"a": [shared, shared], "n": processes.rank()}, 0)
    errors = []
    try:
        processes.on_first(lambda: 1 // 0)
    except ZeroDivisionError as error:
        errors.append(str(error))
    return {
        "sent": sent,
        "is one": sent["a"][0] is sent["a"][1],
        "errors": errors,
        "from the last": processes.broadcast(processes.rank(), processes.world_size() - 1),
        "divided": processes.divided(lambda n: (n * n, processes.rank()), range(5)),
        "told": processes.gather(processes.tells("once")),
    }


def cases(folder):
    """All of it; "kept" with work in a folder."""
    processes.join("cpu", 60.0)
    return {
        "exchanged": exchanged(),
        "spoilt": spoilt(),
        "untuned": quantized(model={"train": "none"}),
        "tuned": quantized(block=TUNED, model=MODEL),
        "kept": quantized(folder, run={"save_every": 0.0, "activation_memory": "1KB"}, **KEPT),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(cases(folder), folder / f"{processes.rank()}.pt")
