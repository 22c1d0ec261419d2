"""A model of the 70B's structure goes through the whole path in memory far below its size."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import WORDS
from large_models import write_llama

CGROUP = Path("/sys/fs/cgroup/memory")
FLAGS = (
    "--text text.txt --budget.allocation uniform --importance.curvature diagonal --admm.iterations 2 "
    "--calibration.windows 8 --calibration.length 64 --model.windows 4 --model.held_out 1 "
    "--model.batch 1 --model.evaluations 1 --model.train scales "
    "--model.kept_logits 16 --model.recompute --model.compile_from null --run.accelerator cpu"
).split()
WINDOW = 8 * 64 * 1024 * 2  # bytes of the hidden states of all windows


@contextmanager
def memory_limit(size):
    """What a child does first to get a hard limit, pages of files included; None where that is not allowed."""
    group = CGROUP / f"nanoquant-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(size))
    except OSError:
        yield None
        return
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


@pytest.mark.slow
def test_a_model_larger_than_memory_is_quantized(tmp_path):
    size, block = write_llama(tmp_path / "dense")
    assert size > 2e9
    (tmp_path / "text.txt").write_text(WORDS * 400)
    bound = 2 * block + 81 * WINDOW + 2**30  # blocks, hidden states at every block and the gradient
    assert bound < 0.6 * size
    command = [sys.executable, "-m", "nanoquant", "quantize", "dense", "out", *FLAGS]
    with memory_limit(bound) as enter:
        done = subprocess.run(command, cwd=tmp_path, preexec_fn=enter, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    record = json.loads((tmp_path / "out.run" / "run.json").read_text())
    peaks = record["memory_bytes"]
    # as the process itself counts, pages of files included
    assert max(peaks[phase] for phase in ("calibrate", "blocks", "model")) < bound, peaks
