"""The benchmark: shapes of linears, all linears of a model, and whole models, packed against bf16 in the same run.

An implementation is compared with float64 before it is timed. What can't be measured is listed as absent, with the
reason; nothing is estimated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch

from nanoquant.benchmark.config import PARTS, BenchConfig
from nanoquant.benchmark.correctness import check, check_all, check_groups, check_head
from nanoquant.benchmark.linears import (
    DENSE,
    OPERATOR,
    Bench,
    Linear,
    contestants,
    distinct_linears,
)
from nanoquant.benchmark.model import Arm, build, check_context
from nanoquant.benchmark.process import time_arms
from nanoquant.benchmark.setup import Target, make_bench, roofs, targets
from nanoquant.benchmark.shapes import skeleton
from nanoquant.benchmark.speed import time_chain, time_linear
from nanoquant.benchmark.timing import AbsentError, available_bytes
from nanoquant.embedding import EmbeddingConfig
from nanoquant.model_embeddings import check_embeddings
from nanoquant.progress import Progress
from nanoquant.recipe import versions
from nanoquant.sizes import measure_sizes
from nanoquant.sources import device_of

Absent = Callable[[str, str], None]
"""Told the name of what has no figure, and why."""


class Group(NamedTuple):
    """Rows that are measured together: what they have in common, and the function that measures them."""

    where: dict[str, Any]
    measure: Callable[[Absent], list[dict[str, Any]]]

    @property
    def label(self) -> str:
        """The common values in a few words, for a bar."""
        names = ("model", "bits", "d_out", "d_in", "tokens")
        return ", ".join(f"{name} {self.where[name]}" for name in names if name in self.where)


def run_bench(
    config: BenchConfig, progress: Progress, keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Measure everything that is asked for.

    Args:
        config: what and how.
        progress: told of the phases "roofs", "correctness", and then those of ``config.parts_asked``.
        keep: called with the results so far, marked as unfinished, after every group of rows.

    Returns:
        Plain values: date, versions, device, settings, a list of figures for each part, and what is absent.

    Raises:
        ValueError: bad input.
        FloatingPointError: an implementation is wrong; nothing was timed then.
    """
    device, models = device_of(config.device), targets(config)
    if "model" in config.parts_asked:
        for target in models:
            check_context(target.name, target.config, config.context, config.repeats)
            check_embeddings(skeleton(target.config), EmbeddingConfig(bits=config.embedding_bits))
    results: dict[str, Any] = {
        "finished": False,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions() | {"cuda": torch.version.cuda},
        "settings": asdict(config),
        **{part: [] for part in PARTS},
        "absent": [],
    }
    cards = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.no_grad(), torch.random.fork_rng(cards):
        torch.manual_seed(config.seed)
        with progress.phase("roofs", 1):
            bench = make_bench(config, models, device)
            results["device"] = roofs(bench, device, _absentees(results, {"part": "roofs"}))
        cases = [(target, bits) for target in models for bits in config.numbers("bits", float)]
        right = check_cases(config, cases, bench, progress, results)
        for part, groups in (("shapes", shape_groups), ("chain", chain_groups)):
            if part in config.parts_asked:
                planned = [g for case in cases for g in groups(config, *case, bench)]
                _measure(part, planned, results, progress, keep)
        if "model" in config.parts_asked:
            del bench  # its memory is for the models now
            planned = list(model_groups(config, models, right, device))
            _measure("model", planned, results, progress, keep)
    results["finished"] = True
    return results


def _measure(
    part: str,
    groups: list[Group],
    results: dict[str, Any],
    progress: Progress,
    keep: Callable[[dict[str, Any]], object],
) -> None:
    """Measure the groups of a part one after the other, and keep what there is after each."""
    copy = results["device"]["copy_gb_per_s"]
    with progress.phase(part, len(groups)):
        for where, measure in groups:
            progress.advance(0, Group(where, measure).label)
            for row in measure(_absentees(results, {"part": part} | where)):
                if "gb_per_s" in row:
                    row["fraction_of_copy"] = None if copy is None else row["gb_per_s"] / copy
                results[part].append(where | row)
            keep(results)
            progress.advance(1)


def check_cases(
    config: BenchConfig,
    cases: list[tuple[Target, float]],
    bench: Bench,
    progress: Progress,
    results: dict[str, Any],
) -> list[tuple[Target, float]]:
    """Compare every implementation with float64 on every linear that is going to be used.

    Returns:
        The cases whose linears the operator serves; where a model is to decode with the others, they are absent.

    Raises:
        FloatingPointError: one is wrong.
    """
    tokens = config.numbers("tokens", int) if config.times_linears else []
    checks = {(linear, n): None for case in cases for linear in _kinds(*case) for n in tokens}
    decoding = cases if "model" in config.parts_asked else []
    right = []
    with progress.phase("correctness", len(checks) + len(decoding)):
        for linear, n in checks:
            progress.advance(0, f"{linear.d_out} x {linear.d_in}, rank {linear.rank}, {n} tokens")
            check_all(bench, contestants([linear]), [linear], n)
            progress.advance(1)
        for case in cases if "chain" in config.parts_asked else ():
            check_groups(bench, launches(*case, bench.device), tokens)
        for target, bits in decoding:
            try:
                for linear in _kinds(target, bits):
                    check(bench, OPERATOR, linear, 1)
                right.append((target, bits))
            except AbsentError as error:
                where = {"part": "model", **target.depth}
                _absentees(results, where)(_packed(bits, config.embedding_bits), str(error))
            progress.advance(1)
        if decoding and config.embedding_bits != EmbeddingConfig.bits:
            for width in dict.fromkeys(target.config.hidden_size for target, _ in decoding):
                check_head(bench, width, EmbeddingConfig(bits=config.embedding_bits))
    return right


def _kinds(target: Target, bits: float) -> list[Linear]:
    """Every different linear of a model once."""
    return list(dict.fromkeys(target.linears(bits)))


def shape_groups(config: BenchConfig, target: Target, bits: float, bench: Bench) -> Iterator[Group]:
    """Every distinct linear shape of a model, at every number of tokens."""
    linears = {name: target.linear(name, bits) for name in target.shapes}
    for linear, kinds in distinct_linears(linears).items():
        for tokens in config.numbers("tokens", int):
            where = {"bits": bits, "linears": kinds, **asdict(linear), "tokens": tokens}
            where["codebooks"] = None if linear.codebooks is None else str(linear.codebooks)
            measure = functools.partial(time_linear, bench, linear, tokens)
            yield Group(target.depth | where, measure)


def launches(target: Target, bits: float, device: torch.device) -> list[tuple[Linear, ...]]:
    """All linears of a model in order, those together that a packed model launches together on this device."""
    names = target.readers() if device.type == "cuda" else [[name] for name in target.shapes]
    return [tuple(target.linear(name, bits) for name in group) for group in names]


def chain_groups(config: BenchConfig, target: Target, bits: float, bench: Bench) -> Iterator[Group]:
    """All linears of a model in a row, at every number of tokens."""
    together = launches(target, bits, bench.device)
    for tokens in config.numbers("tokens", int):
        measure = functools.partial(time_chain, bench, together, tokens)
        yield Group(target.depth | {"bits": bits, "tokens": tokens}, measure)


def model_groups(
    config: BenchConfig,
    models: list[Target],
    right: list[tuple[Target, float]],
    device: torch.device,
) -> Iterator[Group]:
    """Every model, dense and with all its numbers of bits."""
    for target in models:
        bits = [bits for model, bits in right if model is target]
        measure = functools.partial(model_rows, config, target, bits, device)
        yield Group(target.depth, measure)


def model_rows(
    config: BenchConfig,
    target: Target,
    bits: list[float],
    device: torch.device,
    absent: Absent,
) -> list[dict[str, Any]]:
    """Decoding with the dense model and with a packed one for each number of bits, as far as memory reaches."""
    free = available_bytes(device)
    named = {_packed(one, config.embedding_bits): target.ranks[one] for one in bits}
    arms = []
    for name, ranks in {DENSE: None, **named}.items():
        arm = Arm(
            name=name,
            config=target.config,
            ranks=ranks,
            embedding_bits=EmbeddingConfig.bits if ranks is None else config.embedding_bits,
            device=device.type,
            threads=torch.get_num_threads(),
            seed=config.seed,
            context=config.context,
            repeats=config.repeats,
            most_seconds=config.most_seconds,
        )
        need = measure_sizes(build(arm.config, arm.ranks, arm.embedding_bits)).bytes_resident
        if free is not None and need > free:
            absent(name, f"weights of {need:,} bytes do not fit into {free:,} free bytes")
            continue
        free = None if free is None else free - need
        arms.append(arm)
    figures = time_arms(arms, absent) if arms else {}
    dense = figures.get(DENSE)
    rows = []
    for name, row in figures.items():
        ratio = None if dense is None else row["tokens_per_s"] / dense["tokens_per_s"]
        case = {"arm": name, "context": config.context, "ratio_to_dense": ratio}
        rows.append(case | row)
    return rows


def _packed(bits: float, embedding_bits: int) -> str:
    """Name of the arm that decodes with packed layers."""
    embedding = (
        f", embedding {embedding_bits} bit" if embedding_bits != EmbeddingConfig.bits else ""
    )
    return f"packed, {bits:g} bit{embedding}"


def _absentees(results: dict[str, Any], where: dict[str, Any]) -> Absent:
    """A function that notes what is absent there, and why."""

    def note(name: str, why: str) -> None:
        results["absent"].append(where | {"what": name, "why": why})

    return note
