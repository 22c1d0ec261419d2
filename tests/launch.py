"""Two processes that compute for a test, each with one thread, and what each has left."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def two(script, folder, *arguments, timeout=300):
    """Run ``script FOLDER ARGUMENT...`` under torchrun; gives the RANK.pt that each process writes there."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *launch, Path(script), folder, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]
