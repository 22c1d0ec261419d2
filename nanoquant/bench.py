"""The benchmark: shapes of linears, all linears of a model, and whole models, packed against bf16 in the same run.

An implementation is compared with float64 before it is timed. What can't be measured is listed as absent, with the
reason; nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from transformers import PreTrainedConfig

from nanoquant.bench_config import PARTS, BenchConfig
from nanoquant.bench_linears import DENSE, OPERATOR, Bench, Linear, check, time_chain, time_linear
from nanoquant.bench_model import Arm, build
from nanoquant.bench_process import time_arms
from nanoquant.bench_shapes import (
    distinct_shapes,
    linear_shapes,
    model_config,
    ranks_at,
    skeleton,
)
from nanoquant.bench_timing import (
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
from nanoquant.figures import versions
from nanoquant.progress import Progress
from nanoquant.sizes import measure_sizes
from nanoquant.sources import device_of

LEAST_ROTATION = 256 * 10**6
"""Bytes to rotate over where the cache is small or of unknown size."""
MEMORY_SHARE = 0.25
"""Most of the free memory that one of the two rotations takes, unless told otherwise."""


@dataclass(frozen=True)
class Target:
    """A model to measure: its configuration, and the ranks of its linears for every number of bits."""

    name: str
    config: PreTrainedConfig
    whole_layers: int
    shapes: dict[str, tuple[int, int]]
    ranks: dict[float, dict[str, int]]

    @property
    def depth(self) -> dict[str, Any]:
        """Name and depth, as every figure states them."""
        layers = self.config.num_hidden_layers
        return {"model": self.name, "layers": layers, "of_layers": self.whole_layers}

    def linears(self, bits: float) -> list[Linear]:
        """All linears in order."""
        return [Linear(*self.shapes[name], rank) for name, rank in self.ranks[bits].items()]


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
        ranks = {bits: ranks_at(shapes, bits) for bits in config.numbers("bits", float)}
        found.append(Target(name, settings, whole, shapes, ranks))
    return found


def run_bench(config: BenchConfig, progress: Progress) -> dict[str, Any]:
    """Measure everything that is asked for.

    Args:
        config: what and how.
        progress: told of the phases "roofs" and then those of ``config.parts_asked``.

    Returns:
        Plain values: date, versions, device, settings, a list of figures for each part, and what is absent.

    Raises:
        ValueError: bad input.
        FloatingPointError: an implementation is wrong.
    """
    device, models = device_of(config.device), targets(config)
    torch.manual_seed(config.seed)
    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | {"cuda": torch.version.cuda},
        "settings": asdict(config),
        **{part: [] for part in PARTS},
        "absent": [],
    }
    with torch.no_grad():
        with progress.phase("roofs", 1):
            bench = make_bench(config, models, device)
            results["device"] = roofs(bench, device, results)
        cases = [(target, bits) for target in models for bits in config.numbers("bits", float)]
        for part, measure in (("shapes", shape_rows), ("chain", chain_rows)):
            if part not in config.parts_asked:
                continue
            with progress.phase(part, len(cases)):
                for target, bits in cases:
                    absent = _absentees(results, part=part, **target.depth, bits=bits)
                    for row in measure(config, target, bits, bench, absent):
                        _with_copy(row, results["device"])
                        results[part].append(target.depth | {"bits": bits} | row)
                    progress.advance(1)
        if "model" in config.parts_asked:
            right = [case for case in cases if operator_is_right(bench, *case, results)]
            del bench  # its memory is for the models now
            with progress.phase("model", len(models)):
                for target in models:
                    bits = [bits for model, bits in right if model is target]
                    results["model"] += model_rows(config, target, bits, device, results)
                    progress.advance(1)
    return results


def make_bench(config: BenchConfig, models: list[Target], device: torch.device) -> Bench:
    """Clock, and random memory for packed and for dense weights.

    Raises:
        ValueError: the memory that is asked for is not there.
    """
    cache, free = cache_bytes(device), available_bytes(device)
    linears = {one for model in models for bits in model.ranks for one in model.linears(bits)}
    timed = {"shapes", "chain"} & set(config.parts_asked)
    asked = max(4 * (cache or 0), LEAST_ROTATION) if timed else 0
    if config.rotate_megabytes is not None:
        asked = config.rotate_megabytes * 10**6
    elif free is not None:
        asked = min(asked, int(MEMORY_SHARE * free))
    largest_packed = max(linear.packed_bytes for linear in linears)
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


def roofs(bench: Bench, device: torch.device, results: dict[str, Any]) -> dict[str, Any]:
    """What the device is and can do: bytes copied and operations multiplied in a second, measured here."""
    rates: dict[str, float | None] = {"copy_gb_per_s": None, "matmul_tflop_per_s": None}
    if bench.signs.asked:
        try:
            rates["copy_gb_per_s"] = copy_bandwidth(bench.clock, bench.signs) / 1e9
            rates["matmul_tflop_per_s"] = matmul_rate(bench.clock, device) / 1e12
        except AbsentError as error:
            _absentees(results, part="roofs")()("copy bandwidth or matmul", str(error))
    return {
        "name": device_name(device),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cache_bytes": bench.cache,
        "rotation_bytes": bench.signs.asked,
        **rates,
    }


def operator_is_right(bench: Bench, target: Target, bits: float, results: dict[str, Any]) -> bool:
    """Compare the operator with float64 on all linears of a model; a model that it refuses is absent.

    Raises:
        FloatingPointError: it is wrong.
    """
    try:
        for linear in set(target.linears(bits)):
            check(bench, OPERATOR, linear, 1)
    except AbsentError as error:
        _absentees(results, part="model", **target.depth)()(_packed(bits), str(error))
        return False
    return True


def shape_rows(
    config: BenchConfig, target: Target, bits: float, bench: Bench, absent: Callable[..., None]
) -> Iterator[dict[str, Any]]:
    """Figures of every distinct linear shape of a model, at every number of tokens."""
    for shape, (rank, kinds) in distinct_shapes(target.shapes, target.ranks[bits]).items():
        linear = Linear(*shape, rank)
        for tokens in config.numbers("tokens", int):
            case = {"linears": kinds, **asdict(linear), "tokens": tokens}
            for row in time_linear(bench, linear, tokens, absent(**case)):
                yield case | row


def chain_rows(
    config: BenchConfig, target: Target, bits: float, bench: Bench, absent: Callable[..., None]
) -> Iterator[dict[str, Any]]:
    """Figures of all linears of a model in a row, at every number of tokens."""
    for tokens in config.numbers("tokens", int):
        for row in time_chain(bench, target.linears(bits), tokens, absent(tokens=tokens)):
            yield {"tokens": tokens} | row


def model_rows(
    config: BenchConfig,
    target: Target,
    bits: list[float],
    device: torch.device,
    results: dict[str, Any],
) -> list[dict[str, Any]]:
    """Decoding with the dense model and with a packed one for each number of bits, as far as memory reaches."""
    free = available_bytes(device)
    absent = _absentees(results, part="model", **target.depth)
    arms = []
    for name, ranks in {DENSE: None, **{_packed(one): target.ranks[one] for one in bits}}.items():
        need = measure_sizes(build(target.config, ranks)).bytes_resident
        if free is not None and need > free:
            absent()(name, f"weights of {need:,} bytes do not fit into {free:,} free bytes")
            continue
        free = None if free is None else free - need
        arms.append(
            Arm(
                name=name,
                config=target.config,
                ranks=ranks,
                device=device.type,
                threads=torch.get_num_threads(),
                context=config.context,
                repeats=config.repeats,
                most_seconds=config.most_seconds,
            )
        )
    figures = time_arms(arms, absent()) if arms else {}
    dense = figures.get(DENSE)
    rows = []
    for name, row in figures.items():
        ratio = None if dense is None else row["tokens_per_s"] / dense["tokens_per_s"]
        case = {"arm": name, "context": config.context, "ratio_to_dense": ratio}
        rows.append(target.depth | case | row)
    return rows


def _packed(bits: float) -> str:
    """Name of the arm that decodes with packed layers."""
    return f"packed, {bits:g} bit"


def _with_copy(row: dict[str, Any], device: dict[str, Any]) -> None:
    """Add the share of the copy bandwidth of this run."""
    copy = device["copy_gb_per_s"]
    row["fraction_of_copy"] = None if copy is None else row["gb_per_s"] / copy


def _absentees(results: dict[str, Any], **where: Any) -> Callable[..., Callable[[str, str], None]]:  # noqa: ANN401
    """A function that, told more about where, gives one that notes what is absent there and why."""

    def at(**more: Any) -> Callable[[str, str], None]:  # noqa: ANN401
        def note(name: str, why: str) -> None:
            results["absent"].append(where | more | {"what": name, "why": why})

        return note

    return at
