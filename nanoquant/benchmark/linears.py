"""One linear layer or all of a model in a row: first right against float64, then timed.

Shapes: x (T, d_in), y (T, d_out), T tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nanoquant_kernels
from nanoquant.benchmark.timing import (
    MOST_CALLS,
    AbsentError,
    Call,
    Clock,
    Rotation,
    Timing,
    interleaved,
)
from nanoquant.budget import layer_bits
from nanoquant_kernels import packed_width, reference, unpack_signs

OPERATOR = "operator"
PACKED: dict[str, Callable[..., Tensor]] = {
    OPERATOR: nanoquant_kernels.binary_low_rank_linear,
    "reference": reference.binary_low_rank_linear,
}
"""What is timed, by name: called as (x, u_signs, v_signs, s1, s2, bias, rank). One more is one line more."""
DENSE = "F.linear bf16"
CHECKED_TOKENS = 8
CHUNK = 512
"""Sign columns that are unpacked at a time for the float64 product."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: d_out, d_in and the rank of its packed form."""

    d_out: int
    d_in: int
    rank: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of signs and scales."""
        return layer_bits(self.d_out, self.d_in, self.rank) // 8

    @property
    def dense_bytes(self) -> int:
        """Bytes of the bf16 weight."""
        return 2 * self.d_out * self.d_in

    def weight_bytes(self, name: str) -> int:
        """Bytes of weights that an implementation has to read."""
        return self.dense_bytes if name == DENSE else self.packed_bytes

    def operations(self, name: str, tokens: int) -> int:
        """Floating-point operations of the product as an implementation computes it."""
        factors = self.d_out * self.d_in
        if name != DENSE:
            factors = self.rank * (self.d_out + self.d_in)
        return 2 * tokens * factors


@dataclass
class Bench:
    """What the measurements of linears share: memory, clock, and what was found right already."""

    signs: Rotation
    reals: Rotation
    clock: Clock
    most_error: float
    cache: int | None
    """Bytes of the last cache, None if unknown."""
    errors: dict[tuple, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.signs.memory.device

    def arguments(self, name: str, linear: Linear) -> tuple:
        """Fresh random weights of one layer, as an implementation takes them after x."""
        if name == DENSE:
            return (self.reals.take([linear.d_out, linear.d_in], torch.bfloat16),)
        u = self.signs.take([linear.d_out, packed_width(linear.rank)], torch.uint8)
        v = self.signs.take([linear.rank, packed_width(linear.d_in)], torch.uint8)
        for packed, columns in ((u, linear.rank), (v, linear.d_in)):
            if columns % 8:  # bits past the last column are 0 in the stored layout
                packed[:, -1] &= (1 << columns % 8) - 1
        scales = (self.reals.take([size], torch.bfloat16) for size in (linear.d_out, linear.d_in))
        return (u, v, *scales, None, linear.rank)

    def activations(self, tokens: int, width: int) -> Tensor:
        """Random bf16 activations (T, width)."""
        return torch.randn(tokens, width, device=self.device).bfloat16()

    def in_cache(self, reuse_bytes: int) -> bool | None:
        """Whether weights that come again after so many other bytes may still be in a cache."""
        return None if self.cache is None else reuse_bytes < 4 * self.cache


def function_of(name: str) -> Callable[..., Tensor]:
    """The implementation of a name."""
    return F.linear if name == DENSE else PACKED[name]


def check(bench: Bench, name: str, linear: Linear, tokens: int) -> float:
    """Compare an implementation with float64 on fresh weights, once per layer and token count.

    The rows of some tokens are compared, and the sum of all rows with random signs, in which one wrong row shows.

    Returns:
        Relative error.

    Raises:
        FloatingPointError: the error is above what is allowed, or a value is not finite.
        AbsentError: the implementation does not serve these arguments.
    """
    key = (name, linear, tokens)
    if key in bench.errors:
        return bench.errors[key]
    x, weights = bench.activations(tokens, linear.d_in), bench.arguments(name, linear)
    y = run(name, x, *weights)
    if y.shape != (tokens, linear.d_out):
        raise FloatingPointError(f"{name} gave shape {tuple(y.shape)} for {linear}")
    product = dense_product if name == DENSE else packed_product
    some = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS), device=x.device).long()
    exact = product(x[some].double(), *weights)
    of_rows = (y[some].double() - exact).norm() / exact.norm()
    scale = exact.norm() * (tokens / len(some)) ** 0.5  # about the norm of all rows
    mix = 1 - 2 * torch.randint(2, (1, tokens), device=x.device).double()
    of_mix = (mix @ y.double() - product(mix @ x.double(), *weights)).norm() / scale
    error = torch.stack([of_rows, of_mix]).nan_to_num(torch.inf, torch.inf).max().item()
    if error > bench.most_error:
        raise FloatingPointError(
            f"{name} is wrong: relative error {error:.2g} against float64 at {linear}, {tokens} "
            f"tokens; allowed is {bench.most_error:g}. Nothing was timed with it"
        )
    bench.errors[key] = error
    return error


def check_all(bench: Bench, names: Iterable[str], linears: Iterable[Linear], tokens: int) -> None:
    """Compare implementations with float64 on many layers; those that refuse one are let be.

    Raises:
        FloatingPointError: one is wrong.
    """
    for linear in linears:
        for name in names:
            with contextlib.suppress(AbsentError):
                check(bench, name, linear, tokens)


def run(name: str, *arguments: Any) -> Tensor:  # noqa: ANN401
    """Call an implementation; what it refuses is absent, not an error."""
    try:
        return function_of(name)(*arguments)
    except (ValueError, NotImplementedError) as error:
        raise AbsentError(f"refused: {error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise AbsentError(f"out of memory: {error}") from error


def packed_product(
    x: Tensor, u_signs: Tensor, v_signs: Tensor, s1: Tensor, s2: Tensor, bias: None, rank: int
) -> Tensor:
    """The product in float64, for x in float64; signs are unpacked a few columns at a time."""
    scaled, y = x * s2.double(), x.new_zeros(len(x), len(s1))
    for start in range(0, rank, CHUNK):
        stop = min(start + CHUNK, rank)
        V = unpack_signs(v_signs[start:stop], len(s2), torch.float64)  # (chunk, d_in)
        U = unpack_signs(
            u_signs[:, start // 8 : packed_width(stop)].contiguous(), stop - start, torch.float64
        )  # (d_out, chunk)
        y += scaled @ V.mT @ U.mT
    return y * s1.double()


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T in float64, for x in float64, a few rows of W at a time."""
    return torch.cat([x @ rows.double().mT for rows in weight.split(CHUNK)], dim=-1)


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
    x = bench.activations(tokens, linear.d_in)

    def make(name: str) -> Call:
        return functools.partial(function_of(name), x, *bench.arguments(name, linear))

    timings = _race(bench, make, {linear}, tokens, absent)
    cached = bench.in_cache(min(bench.signs.asked, bench.reals.asked))
    return [
        _figures(name, timings, linear.weight_bytes(name), linear.operations(name, tokens))
        | {"relative_error": bench.errors[name, linear, tokens], "in_cache": cached}
        for name in timings
    ]


def time_chain(
    bench: Bench, linears: list[Linear], tokens: int, absent: Callable[[str, str], None]
) -> list[dict[str, Any]]:
    """Figures of all linears of a model one after the other, as one CUDA graph or as a loop.

    Every layer has weights of its own as far as the rotations reach, the same ones in each repeat: a model that is
    smaller than the cache stays in the cache, as it does when it decodes, and its figures say so.
    """
    inputs = {linear.d_in: bench.activations(tokens, linear.d_in) for linear in linears}

    @functools.cache
    def make(name: str) -> Call:
        function = function_of(name)
        layers = [(inputs[one.d_in], *bench.arguments(name, one)) for one in linears]

        def chain() -> None:
            for layer in layers:
                function(*layer)

        return chain

    timings = _race(bench, make, set(linears), tokens, absent, calls=1)
    rows = []
    for name in timings:
        nbytes = sum(linear.weight_bytes(name) for linear in linears)
        reused = min(nbytes, bench.reals.asked if name == DENSE else bench.signs.asked)
        operations = sum(linear.operations(name, tokens) for linear in linears)
        row = _figures(name, timings, nbytes, operations)
        rows.append(row | {"linears": len(linears), "in_cache": bench.in_cache(reused)})
    return rows


def _race(
    bench: Bench,
    make: Callable[[str], Call],
    linears: set[Linear],
    tokens: int,
    absent: Callable[[str, str], None],
    calls: int = MOST_CALLS,
) -> dict[str, Timing]:
    """Check and prepare every implementation, then time those that can be, in turn."""
    ready = {}
    for name in (DENSE, *PACKED):
        try:
            for linear in linears:
                check(bench, name, linear, tokens)
            ready[name] = bench.clock.prepare(functools.partial(make, name), calls)
        except AbsentError as error:
            absent(name, str(error))
    return interleaved(ready, bench.clock.repeats)


def _figures(
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
