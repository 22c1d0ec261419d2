"""Peaks of memory belong to a phase, not to the whole process."""

from pathlib import Path

import pytest
import torch

from nanoquant.memory import forget_peaks, peak_bytes, resident_bytes

pytestmark = pytest.mark.skipif(
    resident_bytes()["VmHWM"] is None or not Path("/proc/self/clear_refs").exists(),
    reason="needs Linux's figures of this process",
)
SIZE = 300 << 20


def test_a_peak_is_seen_once_and_forgotten():
    forget_peaks()
    before = peak_bytes()["memory_bytes"]
    large = torch.ones(SIZE, dtype=torch.uint8)
    del large
    during = peak_bytes()["memory_bytes"]
    forget_peaks()
    assert during >= before + 0.9 * SIZE
    assert peak_bytes()["memory_bytes"] < during - 0.5 * SIZE


def test_resident_memory_is_at_most_its_peak():
    found = resident_bytes()
    assert 0 < found["VmRSS"] <= found["VmHWM"]
