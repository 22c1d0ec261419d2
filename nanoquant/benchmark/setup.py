"""What is going to be measured, and with what: models and their ranks, memory that weights rotate in, clock, roofs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from nanoquant.benchmark.config import BenchConfig
from nanoquant.benchmark.linears import Bench, Linear
from nanoquant.benchmark.shapes import linear_shapes, model_config, ranks_at, skeleton
from nanoquant.benchmark.timing import (
    BLOCK_BYTES,
    AbsentError,
    CPUClock,
    CUDAClock,
    Rotation,
    available_bytes,
    cache_bytes,
    copy_bandwidth,
    device_name,
    matmul_rate,
)
from nanoquant.product_budget import ProductShape, plan_product
from nanoquant.shared_launch import readers

logger = logging.getLogger(__name__)

LEAST_ROTATION = 256 * 10**6
"""Bytes to rotate over where the cache is small or of unknown size."""
MEMORY_SHARE = 0.25
"""Most of the free memory that one of the two rotations takes, unless told otherwise."""


@dataclass(frozen=True)
class Target:
    """A model to measure: its configuration, and ranks and codebooks of its linears for every number of bits."""

    name: str
    config: PreTrainedConfig
    whole_layers: int
    shapes: dict[str, tuple[int, int]]
    ranks: dict[float, dict[str, int]]
    codebooks: dict[float, dict[str, ProductShape]]
    """Empty for bits that none meet."""

    @property
    def depth(self) -> dict[str, Any]:
        """Name and depth, as every figure states them."""
        layers = self.config.num_hidden_layers
        return {"model": self.name, "layers": layers, "of_layers": self.whole_layers}

    def linear(self, name: str, bits: float) -> Linear:
        """One linear by its full name."""
        books = self.codebooks[bits].get(name)
        return Linear(*self.shapes[name], self.ranks[bits][name], books)

    def linears(self, bits: float) -> list[Linear]:
        """All linears in order."""
        return [self.linear(name, bits) for name in self.shapes]

    def readers(self) -> list[list[str]]:
        """Names of all linears in order, those that read the same tensor together."""
        model = skeleton(self.config)
        try:
            return readers(model, {name: model.get_submodule(name) for name in self.shapes})
        except RuntimeError as error:
            logger.warning(
                "%s: linears that read the same tensor are not found, so each is launched alone: %s",
                *(self.name, error),
            )
            return [[name] for name in self.shapes]


def targets(config: BenchConfig) -> list[Target]:
    """The models of a run.

    Raises:
        ValueError: a model is unknown, or can't have the bits that are asked for.
    """
    found = []
    for name in config.models:
        whole = model_config(name).num_hidden_layers
        settings = model_config(name, config.layers)
        shapes = linear_shapes(skeleton(settings))
        every = config.numbers("bits", float)
        try:
            ranks = {bits: ranks_at(shapes, bits) for bits in every}
        except ValueError as error:
            raise ValueError(
                f"{name}: {error}; signs are measured at all bits, codebooks beside them"
            ) from None
        books = {bits: codebooks_at(name, shapes, bits) for bits in every}
        found.append(Target(name, settings, whole, shapes, ranks, books))
    return found


def codebooks_at(
    name: str, shapes: dict[str, tuple[int, int]], bits: float
) -> dict[str, ProductShape]:
    """Codebooks of every linear as quantization at ``bits`` would choose them; none, with a warning, if none do."""
    try:
        return plan_product(shapes, bits)
    except ValueError as error:
        logger.warning("%s is measured without codebooks: %s", name, error)
        return {}


def make_bench(config: BenchConfig, models: list[Target], device: torch.device) -> Bench:
    """Clock, and random memory for packed and for dense weights.

    Raises:
        ValueError: the memory that is asked for is not there.
    """
    cache, free = cache_bytes(device), available_bytes(device)
    linears = {one for model in models for bits in model.ranks for one in model.linears(bits)}
    asked = max(4 * (cache or 0), LEAST_ROTATION) if config.times_linears else 0
    if config.rotate_megabytes is not None:
        asked = config.rotate_megabytes * 10**6
    elif free is not None:
        asked = min(asked, int(MEMORY_SHARE * free))
    largest_packed = max(linear.aligned_bytes for linear in linears)
    largest_dense = max(linear.dense_bytes for linear in linears)
    if free is not None and 2 * asked + largest_packed + largest_dense > free:
        raise ValueError(
            f"two rotations of {asked:,} bytes and the largest weights do not fit into the "
            f"{free:,} bytes that are free; give a smaller --rotate-megabytes"
        )
    signs = torch.randint(0, 256, (BLOCK_BYTES,), dtype=torch.uint8, device=device)
    reals = torch.randn(BLOCK_BYTES // 2, device=device).bfloat16()
    clock = CPUClock(config.repeats, config.most_seconds)
    if device.type == "cuda":
        clock = CUDAClock(config.repeats, config.most_seconds, max(asked, LEAST_ROTATION))
    return Bench(
        Rotation(asked, largest_packed, signs),
        Rotation(asked, largest_dense, reals),
        clock,
        config.most_error,
        cache,
    )


def roofs(bench: Bench, device: torch.device, absent: Callable[[str, str], None]) -> dict[str, Any]:
    """What the device is and can do: bytes copied and operations multiplied in a second, measured here."""
    roofs = {
        "copy_gb_per_s": lambda: copy_bandwidth(bench.clock, bench.signs) / 1e9,
        "matmul_tflop_per_s": lambda: matmul_rate(bench.clock, device) / 1e12,
    }
    rates: dict[str, float | None] = dict.fromkeys(roofs)
    for name, measure in roofs.items() if bench.signs.asked else ():
        try:
            rates[name] = measure()
        except AbsentError as error:
            absent(name, str(error))
    return {
        "name": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cache_bytes": bench.cache,
        "rotation_bytes": bench.signs.asked,
        "in_cache": bench.in_cache(bench.signs.asked),
        **rates,
    }
