"""Honest times: weights that no cache holds, CUDA graphs or a loop, and what the memory itself can do.

A figure that can't be taken raises :class:`AbsentError`; it is never estimated.
"""

from __future__ import annotations

import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; every piece of a rotation starts at a multiple, as separate allocations do."""
BLOCK_BYTES = 2**22
"""Random bytes that a rotation repeats; caches go by addresses, so repeated data fakes nothing."""
COPY_BYTES = 2**26
LEAST_SECONDS = 2e-3
"""A repeat on a CPU lasts at least this long, so that the clock's own cost does not count."""
MOST_CALLS = 1024
TRIALS = 3
"""Untimed calls at first, to warm up; the fastest says how long the repeats would take on a quiet machine."""
GRAPH_SECONDS = 0.05
Call = Callable[[], object]


class AbsentError(Exception):
    """A figure that can't be taken here; the message says why."""


class TooSlowError(AbsentError):
    """Its repeats would take longer than allowed; more tokens would take longer still."""


class Rotation:
    """Pieces of one block of memory, in turn: a byte comes again only after (almost) all the others.

    Args:
        nbytes: memory to go round in.
        largest: bytes of the largest piece that is going to be asked for.
        block: random tensor that the memory is filled with, over and over.
    """

    def __init__(self, nbytes: int, largest: int, block: Tensor) -> None:
        source = block.reshape(-1).view(torch.uint8)
        self.memory = torch.empty(
            _aligned(nbytes) + _aligned(largest), dtype=torch.uint8, device=block.device
        )
        for piece in self.memory.split(source.numel()):
            piece.copy_(source[: piece.numel()])
        self.asked, self.place = nbytes, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next piece, as a tensor of this shape; what it holds is random."""
        size = math.prod(shape) * dtype.itemsize
        if size > self.memory.numel():
            raise ValueError(f"a piece of {size} bytes is larger than the whole rotation")
        if self.place + size > self.memory.numel():
            self.place = 0
        piece = self.memory[self.place : self.place + size]
        self.place += _aligned(size)
        return piece.view(dtype).view(*shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Timing:
    """Median time of one call over all repeats, and how far the middle half of them lies apart."""

    seconds: float
    spread: float
    """Interquartile range as a share of the median."""


def interleaved(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, Timing]:
    """Time contestants in turn, A B C A B C ..., so that what the machine does meanwhile hits all.

    Args:
        contestants: name to a function that gives the seconds of one call.
        repeats: rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, once in contestants.items():
            seconds[name].append(once())
    return {name: timing(values) for name, values in seconds.items()}


def timing(seconds: Sequence[float]) -> Timing:
    """Median and spread of measured seconds."""
    middle = statistics.median(seconds)
    if len(seconds) < 4:
        return Timing(middle, math.nan)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Timing(middle, (high - low) / middle)


@dataclass(frozen=True)
class CPUClock:
    """Times a loop with perf_counter; every call works on pieces that were never used or are long gone."""

    repeats: int
    most_seconds: float
    """Longest time that all repeats of one figure may take."""
    evicted_bytes = 0
    """Other memory that is read between repeats."""

    def prepare(self, make: Callable[[], Call], calls: int = MOST_CALLS) -> Callable[[], float]:
        """Warm up, and give a function that times one repeat and returns the seconds of one call.

        Args:
            make: gives a call that is ready to run; its own time does not count.
            calls: most calls in one repeat.

        Raises:
            TooSlowError: the repeats would take too long.
        """
        once = fastest(lambda: self._loop([make()]), self.most_seconds)
        count = min(calls, max(1, math.ceil(LEAST_SECONDS / once)))
        check_duration(once * count, self.repeats, self.most_seconds)
        return lambda: self._loop([make() for _ in range(count)])

    def _loop(self, calls: list[Call]) -> float:
        begun = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begun) / len(calls)


class CUDAClock:
    """Times replays of CUDA graphs with events; before each, other memory is read until the caches hold nothing else.

    Args:
        repeats: how often a figure is going to be taken.
        most_seconds: longest time that all repeats of one figure may take.
        evict_bytes: memory that is read before a replay.
    """

    def __init__(self, repeats: int, most_seconds: float, evict_bytes: int) -> None:
        self.repeats, self.most_seconds = repeats, most_seconds
        self.evicted_bytes = evict_bytes
        self.eviction = torch.zeros(max(1, evict_bytes // 8), dtype=torch.int64, device="cuda")

    def prepare(self, make: Callable[[], Call], calls: int = MOST_CALLS) -> Callable[[], float]:
        """As :meth:`CPUClock.prepare`; the calls of a repeat are one graph, each on its own pieces.

        Raises:
            TooSlowError: the repeats would take too long.
            AbsentError: the calls can't be captured.
        """
        once = fastest(lambda: self._eager(make()), self.most_seconds)
        check_duration(once, self.repeats, self.most_seconds)
        ready = [make() for _ in range(min(calls, max(1, math.ceil(GRAPH_SECONDS / once))))]
        try:
            graph = captured(ready)
        except RuntimeError as error:
            raise AbsentError(f"can't be captured in a CUDA graph: {error}") from error
        graph.replay()
        return lambda: self._replay(graph, len(ready))

    def _eager(self, call: Call) -> float:
        """Seconds of one call outside a graph, launches included; for choosing how many to take."""
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    def _replay(self, graph: torch.cuda.CUDAGraph, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.eviction.sum()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


Clock = CPUClock | CUDAClock


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls; they must have run before, so that nothing is compiled in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def fastest(trial: Callable[[], float], hopeless: float) -> float:
    """Seconds of the fastest of ``TRIALS`` trials; one that takes longer than ``hopeless`` is the last."""
    found = math.inf
    for _ in range(TRIALS):
        found = min(found, seconds := trial())
        if seconds > hopeless:
            break
    return found


def check_duration(seconds: float, repeats: int, most: float) -> None:
    """Raise TooSlowError where repeats of so many seconds would take longer than allowed."""
    if seconds * repeats > most:
        raise TooSlowError(
            f"a repeat takes {seconds:.2g} s, so {repeats} take more than the {most:g} s "
            "that --most-seconds allows"
        )


def copy_bandwidth(clock: Clock, rotation: Rotation) -> float:
    """Bytes a second, read and written together, of copies between pieces of a rotation."""
    size = min(COPY_BYTES, rotation.memory.numel() // 4)

    def make() -> Call:
        target, source = (rotation.take([size], torch.uint8) for _ in range(2))
        return lambda: target.copy_(source)

    once = clock.prepare(make, calls=8)
    return 2 * size / interleaved({"copy": once}, clock.repeats)["copy"].seconds


def matmul_rate(clock: Clock, device: torch.device) -> float:
    """Floating-point operations a second of a square bf16 product, the roof of arithmetic."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    once = clock.prepare(lambda: lambda: left @ right, calls=8)
    return 2 * size**3 / interleaved({"matmul": once}, clock.repeats)["matmul"].seconds


def cache_bytes(device: torch.device) -> int | None:
    """Size of the last cache before memory; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        _kibibytes(file.read_text())
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=None)


def _kibibytes(text: str) -> int:
    """Bytes of a size as Linux writes it: 48K."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)\s*", text).groups()
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else os.uname().machine
