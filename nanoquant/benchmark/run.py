"""The benchmark: shapes of linears, all linears of a model, and whole models, packed against bf16 in the same run.

An implementation is compared with float64 before it is timed. What can't be measured is listed as absent, with the
reason; nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from nanoquant.benchmark.config import PARTS, BenchConfig
from nanoquant.benchmark.linears import (
    DENSE,
    OPERATOR,
    PACKED,
    Bench,
    Linear,
    check,
    check_all,
    time_chain,
    time_linear,
)
from nanoquant.benchmark.model import Arm, build
from nanoquant.benchmark.process import time_arms
from nanoquant.benchmark.setup import Target, make_bench, roofs, targets
from nanoquant.benchmark.shapes import distinct_shapes
from nanoquant.benchmark.timing import AbsentError, available_bytes
from nanoquant.figures import versions
from nanoquant.progress import Progress
from nanoquant.sizes import measure_sizes
from nanoquant.sources import device_of


def run_bench(config: BenchConfig, progress: Progress) -> dict[str, Any]:
    """Measure everything that is asked for.

    Args:
        config: what and how.
        progress: told of the phases "roofs", "correctness", and then those of ``config.parts_asked``.

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
            results["device"] = roofs(bench, device, _absentees(results, part="roofs")())
        cases = [(target, bits) for target in models for bits in config.numbers("bits", float)]
        with progress.phase("correctness", len(cases)):
            for target, bits in cases:
                for tokens in config.numbers("tokens", int) if config.times_linears else ():
                    check_all(bench, [DENSE, *PACKED], set(target.linears(bits)), tokens)
                progress.advance(1)
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
