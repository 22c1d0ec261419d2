"""The command as SLURM starts it: one table, one refusal, and a lost process that costs one block at most."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from command_line import SMALL, WORDS
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.cli import LOST

LAYERS, LONGEST = 8, 180
FLAGS = (*SMALL, *"--text text.txt --run.accelerator cpu --run.save_every 0".split())
LONG = (*FLAGS, "--admm.iterations", "80", "--budget.allocation", "uniform")
STARTED = []

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("slurm")
    tiny_llama(layers=LAYERS).save_pretrained(place / "dense")
    tiny_tokenizer().save_pretrained(place / "dense")
    (place / "text.txt").write_text(WORDS * 100)
    return place


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """Whatever a test has started ends with it."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(place, *arguments, count=2):
    """Processes of one command, as srun starts them on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    machine |= {"SLURM_NTASKS": str(count), "SLURM_NTASKS_PER_NODE": str(count)}
    machine |= {"SLURM_JOB_NAME": "test", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    found = [
        subprocess.Popen(
            [sys.executable, "-m", "nanoquant", *arguments],
            cwd=place,
            env=os.environ | machine | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    STARTED.extend(found)
    return found


def ends(processes):
    """Exit code, stdout and stderr of each."""
    found = [process.communicate(timeout=LONGEST) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def blocks(place, name):
    return len(list((place / f"{name}.run").glob("unfinished-block-*.safetensors")))


def test_one_process_talks_and_the_result_is_that_of_one(folder):
    (code, out, err), (other, *silent) = ends(start(folder, "quantize", "dense", "two", *FLAGS))
    assert (code, other) == (0, 0), err
    assert silent == ["", ""] and out.count("bits per weight, body") == 1
    assert all(line.startswith("nanoquant: phase ") for line in err.splitlines())
    ((code, *_),) = ends(start(folder, "quantize", "dense", "one", *FLAGS, count=1))
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert code == 0 and one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


def test_what_the_processes_can_not_divide_is_refused_once(folder):
    found = ends(start(folder, "quantize", "dense", "new", *FLAGS, "--model.batch", "1"))
    assert [code for code, *_ in found] == [2, 2]
    lines = [line for *_, err in found for line in err.splitlines() if "phase" not in line]
    assert len(lines) == 1 and "model.batch=1 can't be divided over 2 processes; take 2" in lines[0]
    assert not (folder / "new").exists() and not (folder / "new.run").exists()


def test_a_lost_process_ends_the_others_and_one_process_goes_on(folder):
    ((code, _, err),) = ends(start(folder, "quantize", "dense", "alone", *LONG, count=1))
    assert code == 0, err
    for lost, least in ((1, 1), (0, 3)):
        running = start(folder, "quantize", "dense", "out", *LONG)
        limit = time.monotonic() + LONGEST
        while blocks(folder, "out") < least:
            assert time.monotonic() < limit and running[0].poll() is None
            time.sleep(0.02)
        running[lost].send_signal(signal.SIGKILL)
        found = ends(running)
        code, _, err = found[1 - lost]
        assert code == 1 and f"nanoquant: error: {LOST}" in err, err
    kept = blocks(folder, "out")
    assert least <= kept < LAYERS
    ((code, _, err),) = ends(start(folder, "resume", "out", count=1))
    assert code == 0, err
    one, two = (load_file(folder / name / "model.safetensors") for name in ("alone", "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
