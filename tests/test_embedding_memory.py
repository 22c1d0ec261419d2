"""Tables are made, and made dense again, some rows at a time: the same values, in hardly more than their own memory."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanoquant import embedding
from nanoquant.embedding import (
    PART_BYTES,
    EmbeddingConfig,
    QuantizedHead,
    dense_matrix,
    quantize_table,
    rounded_matrix,
)
from nanoquant_kernels.table import dense_rows

PARTS = 1 << 14
"""Entries at a time, of matrices that are small for a test."""
BOTH = pytest.mark.parametrize("config", [EmbeddingConfig(bits=8), EmbeddingConfig(bits=4)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def allocated(function):
    """Most bytes that tensors and kernels of a call have at once, on a CPU."""
    function()  # what is made once is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert events
    return most


def matrix(dtype=torch.float32, rows=1000, columns=96):
    return torch.randn(rows, columns, generator=torch.manual_seed(0)).to(dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize("part", [1, 96 * 7, 96 * 1000])
def test_rows_are_the_same_however_many_are_made_at_a_time(part, dtype, config, monkeypatch):
    weight = matrix(dtype)
    whole = quantize_table(weight, config)
    monkeypatch.setattr(embedding, "PART", part)
    table = quantize_table(weight, config)
    for one, other in zip(table, whole, strict=True):
        assert (one is other is None) or (one.dtype == other.dtype and torch.equal(one, other))
    dense = dense_rows(*whole)
    for found in (dense_matrix(table), rounded_matrix(weight, config), QuantizedHead(table)):
        found = found if isinstance(found, torch.Tensor) else found.dequantize()
        assert found.dtype == dtype and torch.equal(found, dense)


@BOTH
@DTYPES
def test_tables_and_dense_matrices_take_their_own_memory_and_that_of_a_part(
    dtype, config, monkeypatch
):
    monkeypatch.setattr(embedding, "PART", PARTS)
    weight = matrix(dtype, 4096, 256)
    table, work = quantize_table(weight, config), PART_BYTES * PARTS
    own = sum(part.nbytes for part in table if part is not None)
    assert own <= allocated(lambda: quantize_table(weight, config)) < own + work < 1.5 * own
    for made in (lambda: dense_matrix(table), lambda: rounded_matrix(weight, config)):
        assert weight.nbytes <= allocated(made) < weight.nbytes + work < 1.2 * weight.nbytes
