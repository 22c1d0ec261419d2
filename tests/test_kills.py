"""A run that is killed at twenty random moments ends with the checkpoint of one that was left alone."""

import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import WORDS
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_tokenizer

KILLS, LAYERS, SLOWEST_START = 20, 8, 120
FLAGS = (
    "--text text.txt --eval-text text.txt --eval-windows 8 --eval-length 32 --budget.rank_multiple 8 "
    "--sensitivity.iterations 8 --admm.iterations 60 --calibration.windows 8 --calibration.length 32 "
    "--block.windows 8 --block.dense_epochs 4 --block.refine_epochs 4 --block.relative_rates "
    "--block.latent_lr 1e-3 --block.scale_lr 1e-3 --model.windows 96 --model.epochs 8 --model.held_out 2 "
    "--self-text.windows 8 --self-text.prompt 4 --run.save_every 1 --run.accelerator cpu"
).split()


def start(place, out, log):
    command = [sys.executable, "-m", "nanoquant", "quantize", "dense", out, *FLAGS]
    return subprocess.Popen(command, cwd=place, stderr=log.open("w"), stdout=subprocess.DEVNULL)


def told(log):
    """Blocks that the process said were finished."""
    found = re.findall(rf"blocks, (\d+)/{LAYERS}", log.read_text())
    return int(found[-1]) if found else 0


@pytest.mark.slow
def test_twenty_kills_change_nothing_and_lose_no_finished_block(tmp_path):
    tiny_llama(layers=LAYERS, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(WORDS * 400)
    log = tmp_path / "log"
    assert start(tmp_path, "alone", log).wait() == 0, log.read_text()
    chance, kept = random.Random(0), 0
    for _ in range(KILLS):
        process, limit = start(tmp_path, "out", log), time.monotonic() + SLOWEST_START
        while "phase 1" not in log.read_text():
            assert process.poll() is None and time.monotonic() < limit, log.read_text()
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        files = len(list((tmp_path / "out.run").glob("unfinished-block-*.safetensors")))
        assert files >= max(kept, told(log))
        kept = files
    assert start(tmp_path, "out", log).wait() == 0, log.read_text()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "out.run").glob("unfinished-*"))
