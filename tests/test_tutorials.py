"""Tutorials run as a reader runs them, each in a process of its own, and what they print shows what they teach."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "tutorials"
MOST = 120
"""Seconds that a tutorial may take."""
HELPERS = {"small_model"}
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in HELPERS)


def run(name, *arguments):
    """What a tutorial prints; on stderr are phases of commands and nothing else."""
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=MOST,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("nanoquant: ")]
    assert (done.returncode, said) == (0, []), done.stderr
    return done.stdout


def numbers(line):
    """All numbers of a line."""
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", line)]


def after(out, beginning):
    """Numbers of the first line that begins so, without its beginning."""
    line = next(x for x in out.splitlines() if x.strip().startswith(beginning))
    return numbers(line.strip().removeprefix(beginning))


def test_one_matrix(tmp_path):
    drawn = importlib.util.find_spec("matplotlib") is not None
    image = tmp_path / "errors.png"
    out = run("one_matrix", *(["--plot", image] if drawn else []))
    assert not drawn or image.read_bytes().startswith(b"\x89PNG")
    rows = [after(out, f"{rank} ") for rank in (32, 64, 96, 128)]
    errors = [error for _, _, error in rows]
    assert errors == sorted(errors, reverse=True)  # more bits, less error
    assert all(bound < error for _, bound, error in rows)
    assert after(out, "320 ") < after(out, "5 ")  # more iterations
    weighted = "fit, error weighted by importance:"
    assert after(out, f"weighted   {weighted}")[0] < 0.8 * after(out, f"unweighted {weighted}")[0]


def test_one_block():
    out = run("one_block")
    (signs, worse), (tuned, better) = after(out, "signs only"), after(out, "tuned")
    assert tuned < 0.7 * signs and after(out, "dense")[1] < better < worse
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj" in out


@pytest.mark.slow
def test_whole_model():
    out = run("whole_model")
    (dense,), (packed,) = after(out, "dense: perplexity"), after(out, "loaded: perplexity")
    assert dense < packed < 1.15 * dense
    (bits,) = after(out, "bits a weight of the quantized linears:")
    assert 1.4 < bits <= 1.5
    start, end = after(out, "0 "), after(out, "32 ")
    assert end[0] < 0.5 * start[0]  # of the divergence


@pytest.mark.slow
def test_dashboard_and_report(tmp_path):
    out = run("dashboard_and_report", tmp_path / "page")
    for series in ("model/loss", "block_00/loss", "block_01/loss"):
        _, first, last = after(out, series)
        assert last < first
    assert "status finished" in out and "linears with the largest error" in out
    drawn = (tmp_path / "page" / "report.html").is_file()
    assert drawn or "needs the package matplotlib" in out


def test_write_kernel():
    pytest.importorskip("triton")
    out = run("write_kernel")
    assert after(out, "one wrong sign of 5440: error")[0] > 1e-3  # shows above every bound
    assert out.count("SUCCESS") == 2
    packed, dense = after(out, "bytes of the layer:")[:2]
    assert packed < dense / 3


def test_add_architecture():
    out = run("add_architecture")
    assert "refused: layers.0.experts" in out and "share an input: value (q), gate (k+v)" in out
    assert "quantized 10 linears" in out and "same logits: True" in out


def test_add_initializer():
    out = run("add_initializer")
    plain, rotated, admm = (
        after(out, name) for name in ("singular signs", "the same, rotated", "ADMM")
    )
    assert admm[0] < rotated[0] < plain[0] and admm[1] < rotated[1] < plain[1]


@pytest.mark.slow
def test_many_devices():
    out = run("many_devices")
    assert "2 processes have the same signs: True" in out
    differ, total = after(out, "signs that differ from one process:")
    assert differ < 1e-3 * total
    one, two = re.findall(r"(\d\.\d+e-\d+) with", out)
    assert float(one) == pytest.approx(float(two), rel=1e-2)


def test_bits_for_8gb():
    out = run("bits_for_8gb")
    assert after(out, "bf16 ")[2] > 8 > after(out, "int4, groups of 128")[2]
    assert "recommended: int4" in out
    assert "llama-3.1-70b for math: llama-3.1-8b at int4" in out
    bits = [row[-1] for row in (numbers(x) for x in out.splitlines() if re.match(r"[\d.]+GB ", x))]
    assert (
        bits[0] < bits[1] > bits[2]
    )  # 8 bits for the embedding leave more; a smaller file leaves less


def test_each_tutorial_has_a_test_and_a_line_in_the_reading_order():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)\.py`", readme)) == {*NAMES, *HELPERS}
    assert all(f"test_{name}" in globals() for name in NAMES)
    for name in NAMES:
        assert f"python tutorials/{name}.py" in (FOLDER / f"{name}.py").read_text(encoding="utf-8")
