"""Times of one linear layer, and of all linears of a model in a row; what is timed has been found right.

On a GPU the packed model shares the launches of linears that read the same tensor, so that is a contestant there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nanoquant.benchmark.correctness import check, check_group
from nanoquant.benchmark.linears import (
    DENSE,
    OPERATOR,
    SHARED,
    Bench,
    Linear,
    contestants,
    function_of,
    kernel_of,
)
from nanoquant.benchmark.timing import (
    MOST_CALLS,
    AbsentError,
    Call,
    Timing,
    TooSlowError,
    interleaved,
)
from nanoquant.shared_launch import MOST_TOKENS
from nanoquant_kernels import binary_low_rank_linears

Group = tuple[Linear, ...]
"""Linears that read the same tensor."""


def time_linear(
    bench: Bench, linear: Linear, tokens: int, absent: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """Figures of every implementation on one layer, in one interleaved run.

    Args:
        bench: memory and clock.
        linear: the layer.
        tokens: T.
        absent: told the name and the reason where an implementation has no figure.
    """
    x, kernels = bench.activations(tokens, linear.d_in), {}

    def make(name: str) -> Call:
        weights = bench.arguments(name, linear)
        kernels[name] = kernel_of(name, x, linear, weights)
        return functools.partial(function_of(name), x, *weights)

    def right(name: str) -> None:
        check(bench, name, linear, tokens)

    timings = race(bench, contestants([linear]), [linear], tokens, right, make, absent)
    cached = bench.in_cache(min(bench.signs.asked, bench.reals.asked))
    return [
        figures(name, timings, linear.weight_bytes(name), linear.operations(name, tokens))
        | {"kernel": kernels[name], "in_cache": cached}
        | {"relative_error": bench.errors[name, linear, tokens]}
        for name in timings
    ]


def time_chain(
    bench: Bench, groups: list[Group], tokens: int, absent: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """Figures of every implementation on all linears of a model one after the other.

    Every layer has weights of its own as far as the rotations reach, the same ones in each repeat: a model that is
    smaller than the cache stays in the cache, as it does when it decodes, and its figures say so.

    Args:
        bench: memory and clock.
        groups: the linears in order; one with more than one member is launched as such, besides each alone.
        tokens: T.
        absent: told the name and the reason where an implementation has no figure.
    """
    linears = [linear for group in groups for linear in group]
    inputs = {one.d_in: bench.activations(tokens, one.d_in) for one in linears}
    shared = tokens <= MOST_TOKENS and len(groups) < len(linears)

    def right(name: str) -> None:
        for linear in dict.fromkeys(linears):
            check(bench, OPERATOR if name == SHARED else name, linear, tokens)
        for group in dict.fromkeys(groups) if name == SHARED else ():
            check_group(bench, group, tokens)

    @functools.cache
    def make(name: str) -> Call:
        parts = groups if name == SHARED else [(linear,) for linear in linears]
        calls = [_call(bench, name, part, inputs[part[0].d_in]) for part in parts]

        def chain() -> None:
            for call in calls:
                call()

        return chain

    names = [*contestants(linears), *([SHARED] if shared else [])]
    timings = race(bench, names, linears, tokens, right, make, absent, calls=1)
    rows = []
    for name in timings:
        nbytes = sum(linear.weight_bytes(name) for linear in linears)
        asked = bench.reals.asked if name == DENSE else bench.signs.asked
        between = asked if nbytes > asked else nbytes + bench.clock.evicted_bytes
        operations = sum(linear.operations(name, tokens) for linear in linears)
        row = figures(name, timings, nbytes, operations)
        rows.append(row | {"linears": len(linears), "in_cache": bench.in_cache(between)})
    return rows


def _call(bench: Bench, name: str, part: Group, x: torch.Tensor) -> Call:
    """One launch with fresh weights: of a group, or of a linear alone."""
    if len(part) == 1:
        function = function_of(OPERATOR if name == SHARED else name)
        return functools.partial(function, x, *bench.arguments(name, part[0]))
    weights = [bench.arguments(name, linear) for linear in part]
    return functools.partial(binary_low_rank_linears, x, *map(list, zip(*weights, strict=True)))


def race(
    bench: Bench,
    names: Iterable[str],
    layers: Sequence[Linear],
    tokens: int,
    right: Callable[[str], None],
    make: Callable[[str], Call],
    absent: Callable[[str, str], None],
    calls: int = MOST_CALLS,
) -> dict[str, Timing]:
    """Check and prepare every implementation, then time those that can be, in turn.

    Args:
        bench: memory, clock, and what took too long with fewer tokens; that is not tried again.
        names: implementations.
        layers: what one call runs.
        tokens: T.
        right: compares an implementation with float64.
        make: gives a call of an implementation.
        absent: told the name and the reason where an implementation has no figure.
        calls: most calls in one repeat.
    """
    ready = {}
    for name in names:
        key = name, *layers
        try:
            if bench.too_slow.get(key, tokens) < tokens:
                raise AbsentError(f"took too long with {bench.too_slow[key]} tokens already")
            right(name)
            ready[name] = bench.clock.prepare(functools.partial(make, name), calls)
        except TooSlowError as error:
            bench.too_slow[key] = tokens
            absent(name, str(error))
        except AbsentError as error:
            absent(name, str(error))
    return interleaved(ready, bench.clock.repeats)


def figures(
    name: str, timings: dict[str, Timing], weight_bytes: int, operations: int
) -> dict[str, Any]:
    """What all tables have: time, bytes and operations a second, and how much faster than dense."""
    seconds = timings[name].seconds
    dense = timings[DENSE].seconds if DENSE in timings else None
    return {
        "implementation": name,
        "microseconds": seconds * 1e6,
        "spread": timings[name].spread,
        "weight_bytes": weight_bytes,
        "gb_per_s": weight_bytes / seconds / 1e9,
        "tflop_per_s": operations / seconds / 1e12,
        "operations": operations,
        "ratio_to_dense": None if dense is None else dense / seconds,
    }
