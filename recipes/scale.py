"""Print planned memory, disk and time of large models as one table, from their shapes alone.

python recipes/scale.py                the models of recipes/scale.md
python recipes/scale.py llama-2-7b     others, by published name, Hub name or folder
"""

from __future__ import annotations

import sys

import torch

from nanoquant.config import NanoQuantConfig, nanoquant_config
from nanoquant.console import quiet
from nanoquant.estimate.command import find_subject
from nanoquant.estimate.estimate import Estimate, make_estimate
from nanoquant.estimate.request import EstimateConfig
from nanoquant.estimate.subject import Subject
from nanoquant.memory import process_bytes

MODELS = ("llama-2-7b", "llama-3.1-70b", "llama-3.1-405b")
LITTLE = {"kept_logits": 64, "recompute": True}
STUDENTS = {"signs": LITTLE, "scales": LITTLE | {"train": "scales", "compile_from": None}}
VISITS = {"offload": True, "activation_memory": "1GB"}  # the former does nothing on a CPU
PLACES = (("here", 1), ("h100", 1), ("h100", 8), ("h100", 64))
HEADER = ("model", "trains", "on", "GPU, GB", "main, GB", "disk, GB", "checkpoint, GB", "hours")


def config_of(run: str, devices: int) -> NanoQuantConfig:
    """Of a run that takes little memory; each device has a window of a batch."""
    many = {"batch": devices, "shard": run == "signs"} if devices > 1 else {}
    return nanoquant_config(bits=1.0, preset="fast", model=STUDENTS[run] | many, run=VISITS)


def row(
    subject: Subject, run: str, config: NanoQuantConfig, machine: str, devices: int
) -> list[str]:
    """One estimate."""
    request = EstimateConfig(source=subject.name, machine=machine, devices=devices, eval_windows=64)
    found = make_estimate(subject, config, request, process_bytes(), torch.device("cpu"))
    gpu = machine != "here"
    place = f"{devices} H100" if gpu else f"{torch.get_num_threads()} CPU threads"
    memory = [most(found, device) for device in (True, False)]
    low, high = (sum(pair[k] for pair in found.seconds.values()) / 3600 for k in (0, 1))
    hours = f"{low:.1f} to {high:.1f}"
    disk = sum(vars(found.disk).values()) / 1e9
    checkpoint = found.sizes[0].most / 1e9
    return [subject.name, run, place, *memory, f"{disk:.0f}", f"{checkpoint:.2f}", hours]


def most(found: Estimate, device: bool) -> str:
    """Largest phase in GB with its name; empty where the place is not used."""
    need = max(found.needs, key=lambda need: need.bytes(device))
    size = need.bytes(device)
    return f"{size / 1e9:.0f} ({need.phase})" if size else ""


def main() -> None:
    """The table as Markdown."""
    quiet()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name in sys.argv[1:] or MODELS:
        subject = find_subject(name, nanoquant_config(bits=1.0))
        for run in STUDENTS:
            for machine, devices in PLACES:
                config = config_of(run, devices)
                print(f"| {' | '.join(row(subject, run, config, machine, devices))} |", flush=True)


if __name__ == "__main__":
    main()
