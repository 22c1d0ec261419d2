"""Activations lie in memory as far as the limit goes, and in files that leave no trace beyond it."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import random_windows, tiny_llama

from nanoquant import mapped
from nanoquant.activation_memory import ActivationMemory
from nanoquant.activations import Activations
from nanoquant.architectures import find_decoder
from nanoquant.block_tuning import BlockData, Windows, mean_square
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.mapped import forget, scratch
from nanoquant.model_config import ModelConfig
from nanoquant.quantize import quantize
from nanoquant.training import RunConfig

LIKE = torch.zeros(0, dtype=torch.bfloat16)


def in_file(tensor):
    """Whether a tensor lies in a file: only then memory is given back."""
    return any(
        base <= tensor.data_ptr() < base + len(file())
        for base, file in mapped._maps.items()
        if file() is not None
    )


def test_what_is_beyond_the_limit_lies_in_a_file_and_freed_memory_counts_again(tmp_path):
    memory = ActivationMemory("2kB", tmp_path)
    first, second = memory.empty((10, 10, 5), LIKE), memory.empty((10, 10, 4), LIKE)
    third = memory.empty((10, 10, 2), LIKE)
    assert [in_file(x) for x in (first, second, third)] == [False, False, True]
    assert third.dtype == torch.bfloat16 and third.shape == (10, 10, 2)
    view = second[1:]
    del second
    gc.collect()
    assert memory.used == 1800  # a view keeps it alive
    del view
    gc.collect()
    assert not in_file(memory.empty((10, 10, 5), LIKE))
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_into_a_file_outlives_its_memory(tmp_path):
    tensor = scratch(tmp_path / "new", (50, 1000), torch.float32)
    tensor.copy_(torch.arange(50_000.0).view(50, 1000))
    assert forget([tensor]) > 0
    assert torch.equal(tensor, torch.arange(50_000.0).view(50, 1000))
    tensor[3] += 1
    forget([tensor])
    assert tensor[3, 0] == 3001
    assert scratch(tmp_path, (0, 4), torch.float32).shape == (0, 4)


def test_a_process_that_is_killed_leaves_no_file(tmp_path):
    code = (
        "import os, signal, torch\nfrom pathlib import Path\nfrom nanoquant.mapped import scratch\n"
        f"x = scratch(Path({str(tmp_path)!r}), (1000,), torch.float32).fill_(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_how_much_was_needed_and_where(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ValueError, match=f"4.0 kB of activations.*{tmp_path}: No space left.*raise"
    ):
        ActivationMemory("1kB", tmp_path).empty((20, 100), LIKE)


def test_a_limit_needs_a_folder_and_a_unit():
    with pytest.raises(ValueError, match="activation_memory=4GB needs a folder.*work"):
        ActivationMemory("4GB")
    with pytest.raises(ValueError, match="activation_memory must be a number above 0 with a unit"):
        RunConfig(activation_memory="much")
    config = nanoquant_config(
        run=RunConfig(activation_memory="1GB"),
        budget={"bits": 1.4, "rank_multiple": 8},
        calibration=CalibrationConfig(windows=4, length=16),
        model=ModelConfig(train="none"),
    )
    with pytest.raises(ValueError, match="needs a folder"):
        quantize(tiny_llama(), random_windows(8, 16).flatten(), config)


@pytest.mark.parametrize("limit", [None, "1B"])
def test_two_streams_move_past_blocks_as_the_whole_model_does(limit, tmp_path):
    model, windows = tiny_llama(layers=3), random_windows(5, 16)
    decoder = find_decoder(model)
    expected = model(input_ids=windows, use_cache=False, output_hidden_states=True).hidden_states
    memory = ActivationMemory(limit, tmp_path)
    streams = Activations(model, decoder, windows, memory)
    addresses = set()
    for b, block in enumerate(decoder.blocks):
        data = streams.targets_of(b, block)
        torch.testing.assert_close(data.inputs, expected[b])
        if b < 2:  # the last one of transformers is behind the norm
            torch.testing.assert_close(data.targets, expected[b + 1])
        assert data.inputs is not data.targets and in_file(data.targets) == (limit is not None)
        streams.advance(block, data, f"block {b}")
        addresses |= {data.inputs.data_ptr(), data.targets.data_ptr()}
    assert len(addresses) == 2  # written over, not made anew


def test_windows_are_copies_and_their_mean_square_is_taken_in_parts(monkeypatch):
    inputs, targets = torch.randn(7, 8, 4), torch.randn(7, 8, 4)
    windows = Windows(BlockData(inputs, targets, None), 5)
    assert len(windows) == 5 and windows[2][0].data_ptr() != inputs[2].data_ptr()
    assert torch.equal(windows[2][0], inputs[2]) and torch.equal(windows[2][1], targets[2])
    expected = targets.square().mean((0, 1))
    assert torch.equal(mean_square(targets), expected)
    monkeypatch.setattr("nanoquant.block_tuning.CHUNK_ELEMENTS", 64)
    torch.testing.assert_close(mean_square(targets), expected)
