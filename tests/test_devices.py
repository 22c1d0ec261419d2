"""Another device than the CPU, and models whose blocks visit it: simulated, since tests need no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RUNS = ("tuned blocks", "kept logits", "trained signs")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("far") / "out.json"
    script = Path(__file__).parent / "far_runs.py"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("run", RUNS)
def test_a_run_on_another_device_mixes_no_devices_and_gives_what_the_cpu_gives(found, run):
    signs, rest = found["runs"][run]["from the CPU"]
    assert found["runs"][run]["devices"] == ["far"]
    assert signs < 0.002 and rest < 0.02  # other kernels, so a sign at zero may flip


@pytest.mark.parametrize("run", RUNS)
def test_blocks_that_visit_the_device_become_bit_for_bit_what_those_that_stay_become(found, run):
    assert found["runs"][run]["visiting"] == [0.0, 0.0]


def test_two_blocks_are_on_the_device_at_most(found):
    assert found["at once"] <= 2  # the one whose groups are measured, and each that follows it


def test_a_block_comes_a_few_times_a_phase_and_not_once_for_each_other_block(found):
    # each block: order of linears 2, calls of a check 2, calibration 2, becoming binary 1, two sets of windows 3 each
    assert found["runs"]["kept logits"]["visits"] <= 2 * 13


def test_a_training_that_is_given_up_leaves_the_model_where_it_was(found):
    assert found["given up"] == "far"
