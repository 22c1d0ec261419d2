"""The offline tuner: what it writes into the table, with a measurement that is played."""

import json
import subprocess
import sys

import pytest
import torch

from nanoquant_kernels import tiles, tune

SHAPES = [(1024, 64), (8192, 512)]


def played(kernel, tile, rows, words, tokens):
    """Flip is fast at small shapes only, wide tiles win at large ones, and four warps never run."""
    if tile.warps == 4:
        return float("inf")
    if kernel == "flip":
        return rows / 100 + tile.rows
    return 40 + abs(tile.rows - (16 if rows < 4096 else 64))


def test_the_fastest_tile_of_each_shape_and_kernel_is_listed():
    table = tune.tuned(tiles.table(), 90, SHAPES, [1, 16], played)
    found = {
        (e["kernel"], e["tokens"], tuple(e["shape"])): e["tile"]
        for e in table["tiles"]
        if e["architecture"] == 90 and e["tokens"] in (1, 16)
    }
    assert len(found) == 6  # flip serves one token only
    assert found["dot", 1, (1024, 64)]["rows"] == 16
    assert found["dot", 16, (8192, 512)]["rows"] == 64
    assert all(tile["warps"] != 4 for tile in found.values())


def test_the_kernel_is_the_one_that_is_faster_over_all_shapes():
    for shapes, name in ((SHAPES[:1], "flip"), (SHAPES, "dot")):
        table = tune.tuned(tiles.table(), 90, shapes, [1], played)
        listed = [(e["architecture"], e["tokens"], e["kernel"]) for e in table["kernels"]]
        assert (90, 1, name) in listed


def test_a_kernel_that_fails_on_one_shape_does_not_win():
    def fails(kernel, tile, rows, words, tokens):
        return (
            float("inf") if kernel == "flip" and rows > 4096 else played(kernel, tile, rows, 0, 1)
        )

    table = tune.tuned(tiles.table(), 90, SHAPES, [1], fails)
    names = [e["kernel"] for e in table["kernels"] if e["architecture"] == 90 and e["tokens"] == 1]
    assert names == ["dot"]


def test_other_architectures_and_token_counts_stay():
    before = tiles.table()
    after = tune.tuned(before, 90, SHAPES, [16], played)
    for name in ("kernels", "tiles"):
        kept = [e for e in before[name] if e["architecture"] != 90 or e["tokens"] != 16]
        assert all(entry in after[name] for entry in kept)


def test_an_interrupted_tuner_keeps_the_tokens_that_it_has_measured(tmp_path):
    def stopped(kernel, tile, rows, words, tokens):
        if tokens == 16:
            raise KeyboardInterrupt
        return played(kernel, tile, rows, words, tokens)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(90, SHAPES, [1, 16], stopped, tmp_path / "tiles.json")
    kept = json.loads((tmp_path / "tiles.json").read_text())
    assert kept == tune.tuned(tiles.table(), 90, SHAPES, [1], played)


def test_a_card_on_which_nothing_runs_is_an_error():
    with pytest.raises(
        RuntimeError, match="no kernel runs on architecture 90 with 16 tokens on all shapes"
    ):
        tune.tuned(tiles.table(), 90, SHAPES, [16], lambda *args: float("inf"))


def test_the_stored_table_is_as_the_tuner_writes_it(tmp_path):
    tiles.write(tiles.table(), tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == tiles.TABLE.read_text()
    assert json.loads(tiles.TABLE.read_text()) == tiles.table()


@pytest.mark.parametrize("bad", ["4096", "4096x", "0x64", "64x33", "axb"])
def test_a_shape_that_is_none_is_named(bad):
    with pytest.raises(Exception, match="is not like 4096x11008"):
        tune.shape(bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_tuner_says_so():
    command = [sys.executable, "-m", "nanoquant_kernels.tune", "64x64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "tuning needs a CUDA device, and none is available" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tile_is_measured_on_a_gpu():
    for kernel, tile in (("dot", tiles.DotTile()), ("flip", tiles.FlipTile())):
        assert 0 < tune.measure_on_gpu(kernel, tile, 1024, 64, 1) < 1000
