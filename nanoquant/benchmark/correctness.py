"""Right before fast: implementations against float64 on fresh random weights.

Shapes: x (T, d_in), y (T, d_out), T tokens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanoquant.benchmark.linears import (
    DENSE,
    LOOKED_UP,
    OPERATOR,
    SHARED,
    Bench,
    Linear,
    attempt,
    run,
)
from nanoquant.benchmark.timing import AbsentError
from nanoquant.embedding import EmbeddingConfig, QuantizedHead, quantize_table
from nanoquant.packed_linear import frozen
from nanoquant.shared_launch import MOST_TOKENS
from nanoquant_kernels import binary_low_rank_linears, packed_width, product, unpack_signs

CHECKED_TOKENS = 8
HEAD_ROWS = 4096
CHUNK = 512
"""Sign columns that are unpacked at a time for the float64 product."""


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
    error = error_of(y, x, lambda x: exact_product(name)(x, *weights))
    refuse_wrong(bench, name, error, f"{linear}, {tokens} tokens")
    bench.errors[key] = error
    return error


def error_of(y: Tensor, x: Tensor, exact: Callable[[Tensor], Tensor]) -> float:
    """Relative error of ``y`` for ``x``, where ``exact`` gives the truth for x in float64; infinite if not finite."""
    tokens = len(x)
    some = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS), device=x.device).long()
    truth = exact(x[some].double())
    of_rows = (y[some].double() - truth).norm() / truth.norm()
    scale = truth.norm() * (tokens / len(some)) ** 0.5  # about the norm of all rows
    mix = 1 - 2 * torch.randint(2, (1, tokens), device=x.device).double()
    of_mix = (mix @ y.double() - exact(mix @ x.double())).norm() / scale
    return torch.stack([of_rows, of_mix]).nan_to_num(torch.inf, torch.inf).max().item()


def refuse_wrong(bench: Bench, name: str, error: float, where: str) -> None:
    """Raise FloatingPointError if the error is above what is allowed."""
    if error > bench.most_error:
        raise FloatingPointError(
            f"{name} is wrong: relative error {error:.2g} against float64 at {where}; allowed is "
            f"{bench.most_error:g}. Nothing was timed with it"
        )


def check_group(bench: Bench, group: tuple[Linear, ...], tokens: int) -> None:
    """Compare shared launches with float64 on fresh weights, once per group and token count.

    Raises:
        FloatingPointError: a member's error is above what is allowed.
        AbsentError: the operator does not serve these arguments.
    """
    key = (SHARED, group, tokens)
    if key in bench.errors:
        return
    x = bench.activations(tokens, group[0].d_in)
    weights = [bench.arguments(OPERATOR, linear) for linear in group]
    found = attempt(binary_low_rank_linears, x, *map(list, zip(*weights, strict=True)))
    errors = [
        error_of(y, x, functools.partial(_exact, weights=own))
        for y, own in zip(found, weights, strict=True)
    ]
    refuse_wrong(bench, SHARED, max(errors), f"{group}, {tokens} tokens")
    bench.errors[key] = max(errors)


def check_groups(bench: Bench, groups: Iterable[tuple[Linear, ...]], tokens: list[int]) -> None:
    """Compare shared launches with float64 as far as they serve.

    Raises:
        FloatingPointError: one is wrong.
    """
    for group in dict.fromkeys(groups):
        for n in tokens:
            if len(group) > 1 and n <= MOST_TOKENS:
                with contextlib.suppress(AbsentError):
                    check_group(bench, group, n)


def _exact(x: Tensor, weights: tuple) -> Tensor:
    return packed_product(x, *weights)


def check_head(bench: Bench, width: int, config: EmbeddingConfig) -> None:
    """Compare a quantized head of ``HEAD_ROWS`` words with float64, for one token.

    Raises:
        FloatingPointError: the error is above what is allowed.
    """
    weight = torch.randn(HEAD_ROWS, width, device=bench.device).bfloat16()
    table = quantize_table(weight, config)
    exact = QuantizedHead(table._replace(scales=frozen(table.scales.double()))).dequantize()
    x = bench.activations(1, width)
    error = error_of(QuantizedHead(table)(x), x, lambda x: x @ exact.mT)
    refuse_wrong(bench, "the quantized head", error, f"{HEAD_ROWS} x {width}, {config.bits} bits")


def check_all(bench: Bench, names: Iterable[str], linears: Iterable[Linear], tokens: int) -> None:
    """Compare implementations with float64 on many layers; those that refuse one are let be.

    Raises:
        FloatingPointError: one is wrong.
    """
    for linear in linears:
        for name in names:
            with contextlib.suppress(AbsentError):
                check(bench, name, linear, tokens)


def exact_product(name: str) -> Callable[..., Tensor]:
    """The product in float64 with what an implementation multiplies with."""
    if name in LOOKED_UP:
        return looked_up_product
    return dense_product if name == DENSE else packed_product


def looked_up_product(x: Tensor, *weight: Tensor | None) -> Tensor:
    """The product in float64, for x in float64, of the reference, whose entries and scales are float64 here."""
    exact = (w.double() if w is not None and w.is_floating_point() else w for w in weight)
    return product.product_linear(x, *exact)


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
