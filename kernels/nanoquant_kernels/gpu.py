"""The product with a packed weight on CUDA: the kernel that the table names, if it can be trusted here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanoquant_kernels import reference
from nanoquant_kernels.cards import architecture, trusted, unavailable
from nanoquant_kernels.layout import pack_signs
from nanoquant_kernels.outputs import parts
from nanoquant_kernels.planes import words_of

TRIALS = (1, 8, 16, 70)
"""Tokens with which a kernel is tried before its first use with as many or fewer; the last stands for all above."""


class Plan(NamedTuple):
    """A kernel by name, and the tiles of its stages."""

    kernel: str
    tiles: tuple = ()


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`, by the fastest kernel that serves."""
    args = x, u_signs, v_signs, s1, s2, bias, rank
    d_out, d_in = s1.shape[0], s2.shape[0]
    return run(plan(x.device, x.dtype, x.numel() // d_in, d_out, d_in, rank), *args)


def plan(
    device: torch.device, dtype: torch.dtype, tokens: int, d_out: int, d_in: int, rank: int
) -> Plan:
    """What the table names for ``tokens`` tokens in ``dtype``; the reference where that can't be trusted."""
    known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    if not tokens or not known or unavailable(device):
        return Plan("reference")
    from nanoquant_kernels import tiles

    arch = architecture(device)
    kernel = tiles.kernel_for(arch, tokens)
    if kernel == "unpack" or dtype == torch.float32:  # tensor cores would round float32
        chosen = Plan("unpack")
    else:
        stages = (rank, words_of(d_in)), (d_out, words_of(rank))
        cut = (tiles.tile_for(arch, kernel, tokens, *stage) for stage in stages)
        chosen = Plan(kernel, tuple(cut))
    return chosen if works(chosen, device, dtype, tokens) else Plan("reference")


def run(chosen: Plan, *args: Tensor | int | None) -> Tensor:
    """Run what was chosen; arguments as in :func:`binary_low_rank_linear`."""
    if chosen.kernel == "reference":
        return reference.binary_low_rank_linear(*args)
    from nanoquant_kernels import triton_dot, triton_flip, triton_unpack

    if chosen.kernel == "stack":
        flat = run_stacked(chosen, args[0], *([value, value] for value in args[1:]))
        d_out = args[3].shape[0]
        return parts(flat, args[0], (d_out, d_out))[1]
    modules = {"dot": triton_dot, "flip": triton_flip, "unpack": triton_unpack}
    return modules[chosen.kernel].binary_low_rank_linear(*args, *chosen.tiles)


def plan_stacked(
    x: Tensor,
    u_signs: list[Tensor],
    v_signs: list[Tensor],
    s1: list[Tensor],
    s2: list[Tensor],
    bias: list[Tensor | None],
    ranks: list[int],
) -> Plan | None:
    """How these linears of the same x share launches on this device; None if they can't."""
    if unavailable(x.device):
        return None
    from nanoquant_kernels import tiles, triton_stack

    d_in = x.shape[-1]
    arch, tokens = architecture(x.device), x.numel() // d_in
    if not triton_stack.serves(x, u_signs, v_signs, s1, s2, bias):
        return None
    if tiles.kernel_for(arch, tokens) != "dot":  # tensor cores are too slow here
        return None
    chosen = Plan("stack", (tiles.tile_for(arch, "dot", tokens, sum(ranks), words_of(d_in)),))
    return chosen if works(chosen, x.device, x.dtype, tokens) else None


def run_stacked(chosen: Plan, x: Tensor, *lists: list) -> Tensor:
    """Run linears of the same x in shared launches; outputs as in :mod:`nanoquant_kernels.outputs`."""
    from nanoquant_kernels import triton_stack

    return triton_stack.binary_low_rank_linears(x, *lists, *chosen.tiles)


def works(chosen: Plan, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the kernel gives the reference's result with these tiles and about so many tokens on this device."""
    count = min(t for t in TRIALS if t >= min(tokens, TRIALS[-1]))

    def attempt() -> tuple[Tensor, Tensor]:
        args = trial(device, dtype, count)
        exact = (t.double() if t.is_floating_point() else t for t in args[:-1])
        return run(chosen, *args), reference.binary_low_rank_linear(*exact, args[-1])

    return trusted((chosen.kernel, dtype, f"{count} tokens", *chosen.tiles), device, attempt)


def trial(device: torch.device, dtype: torch.dtype, tokens: int) -> tuple:
    """Arguments of a product of ``tokens`` tokens with a matrix (200, 512) of rank 256, aligned as most are."""
    d_out, d_in, rank = 200, 512, 256
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g)
    x, bias = torch.randn(tokens, d_in, generator=g), torch.randn(d_out, generator=g)
    s1, s2 = torch.rand(d_out, generator=g) + 0.5, torch.rand(d_in, generator=g) + 0.5
    real = [t.to(device, dtype) for t in (x, s1, s2, bias)]
    signs = [pack_signs(t).to(device) for t in (u, v)]
    return real[0], *signs, *real[1:], rank
