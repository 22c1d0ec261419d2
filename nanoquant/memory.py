"""Memory of this process: what it holds now, and the most that each phase of its work took."""

from __future__ import annotations

import re
from pathlib import Path

import torch

UNKNOWN = 600 << 20
"""Bytes of a process with all libraries where the system does not tell."""


def resident_bytes() -> dict[str, int | None]:
    """Memory of this process in RAM, now (VmRSS) and at most (VmHWM); None where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        text = ""
    found = {name: re.search(rf"{name}:\s+(\d+) kB", text) for name in ("VmRSS", "VmHWM")}
    return {name: int(match[1]) << 10 if match else None for name, match in found.items()}


def process_bytes() -> int:
    """Memory of this process in RAM now, to add what is going to come to it."""
    return resident_bytes()["VmRSS"] or UNKNOWN


def forget_peaks() -> None:
    """Count peaks from now on, where the system allows it; elsewhere they stay those of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> dict[str, int]:
    """Peaks since the last :func:`forget_peaks`: ``memory_bytes`` in RAM, and on a GPU ``gpu_memory_bytes``."""
    found = {"memory_bytes": resident_bytes()["VmHWM"]}
    if torch.cuda.is_available():
        found["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return {name: value for name, value in found.items() if value is not None}
