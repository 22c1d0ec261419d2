"""Quantize with several processes: the same call under torchrun, here two on the CPU, and the same result as with one.

    python tutorials/many_devices.py                                  starts torchrun itself, then compares with one
    torchrun --nproc-per-node 2 tutorials/many_devices.py FOLDER      what it starts; on GPUs: one process for each

`recipes/many_devices.md` says what is divided and what it saves. Each process calls `nanoquant.quantize` alike. Blocks
without tuning, trial factors of measured ranks and windows of training are divided; all processes have the same model
afterwards, and the first one records.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from small_model import TRAIN, small_model, windows

import nanoquant
from nanoquant import processes

LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2"


def quantized():
    """The packed tensors of a small model. Nothing here knows how many processes there are."""
    model, tokenizer = small_model(steps=20)
    config = nanoquant.nanoquant_config(
        bits=1.5,
        budget={"rank_multiple": 8},
        calibration={"windows": 8, "length": 64},
        model={"windows": 64, "batch": 8, "held_out": 4, "compile_from": None},
    )
    report = nanoquant.quantize(model, windows(tokenizer, TRAIN, 100).flatten(), config)
    return {"tensors": dict(model.state_dict()), "losses": report.model.losses}


def worker(folder):
    """One of the processes: quantize, check that all have the same signs, and keep what the first one has."""
    found = quantized()
    signs = [t.long().sum().item() for t in found["tensors"].values() if t.dtype == torch.uint8]
    alike = processes.gather(signs)
    if processes.first():
        print(f"{processes.world_size()} processes have the same signs: {alike[0] == alike[1]}")
        torch.save(found, folder / "two.pt")


def main():
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    if len(sys.argv) > 1:
        worker(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *LAUNCH.split(), __file__, folder]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        two = torch.load(Path(folder, "two.pt"))

    # The same in this process alone. Signs before training are equal bit for bit; gradients are averages over the
    # processes, so training agrees to rounding, and a sign on the edge may differ.
    one = quantized()
    differ = total = 0
    for name, tensor in one["tensors"].items():
        if tensor.dtype == torch.uint8:
            bits = (tensor ^ two["tensors"][name])[..., None] >> torch.arange(8) & 1
            differ, total = differ + int(bits.sum()), total + bits.numel()
    print(f"signs that differ from one process: {differ} of {total}")
    last = [found["losses"][-1] for found in (one, two)]
    print(f"loss of the last step: {last[0]:.3e} with one process, {last[1]:.3e} with two")


if __name__ == "__main__":
    main()
