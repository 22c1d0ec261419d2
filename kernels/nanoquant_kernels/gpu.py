"""The product with a packed weight on CUDA: the kernel that the table names, if it can be trusted here."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import reference
from nanoquant_kernels.cards import architecture, trusted, unavailable
from nanoquant_kernels.layout import pack_signs
from nanoquant_kernels.planes import words_of

TRIALS = (1, 16, 70)
"""Tokens with which a kernel is tried before its first use with as many or fewer; the last stands for all above."""


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
    tokens = x.numel() // s2.shape[0] if s2.shape[0] else 0
    name = choose(x.device, x.dtype, tokens) if tokens and rank else "reference"
    return run(name, *args) if name != "reference" else reference.binary_low_rank_linear(*args)


def choose(device: torch.device, dtype: torch.dtype, tokens: int) -> str:
    """Name of the kernel for ``tokens`` tokens in ``dtype`` on this device; reference where none works."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or unavailable(device):
        return "reference"
    from nanoquant_kernels import tiles

    name = tiles.kernel_for(architecture(device), tokens)
    if dtype == torch.float32:  # tensor cores would round it
        name = "unpack"
    return name if works(name, device, dtype, tokens) else "reference"


def run(
    name: str, x: Tensor, u_signs: Tensor, v_signs: Tensor, s1: Tensor, *rest: Tensor | int | None
) -> Tensor:
    """Run a kernel by name with the tiles that the table has for its two stages."""
    from nanoquant_kernels import tiles, triton_dot, triton_flip, triton_unpack

    if name == "stack":
        return run_stacked(x, *([value, value] for value in (u_signs, v_signs, s1, *rest)))[1]
    if name == "unpack":
        return triton_unpack.binary_low_rank_linear(x, u_signs, v_signs, s1, *rest)
    s2, _, rank = rest
    kernel = {"dot": triton_dot, "flip": triton_flip}[name]
    arch, tokens = architecture(x.device), x.numel() // s2.shape[0]
    v_tile = tiles.tile_for(arch, name, tokens, rank, words_of(s2.shape[0]))
    u_tile = tiles.tile_for(arch, name, tokens, s1.shape[0], words_of(rank))
    return kernel.binary_low_rank_linear(x, u_signs, v_signs, s1, *rest, v_tile, u_tile)


def can_stack(
    x: Tensor,
    u_signs: list[Tensor],
    v_signs: list[Tensor],
    s1: list[Tensor],
    s2: list[Tensor],
    *_: list,
) -> bool:
    """Whether these linears of the same x can share launches on this device."""
    if x.dtype not in (torch.bfloat16, torch.float16) or unavailable(x.device):
        return False
    from nanoquant_kernels import triton_stack

    if not triton_stack.serves(x, u_signs, v_signs, s1, s2):
        return False
    return works("stack", x.device, x.dtype, x.numel() // x.shape[-1])


def run_stacked(x: Tensor, *lists: list) -> list[Tensor]:
    """Run linears of the same x in shared launches."""
    from nanoquant_kernels import tiles, triton_stack

    ranks, d_in = lists[-1], x.shape[-1]
    arch, tokens = architecture(x.device), x.numel() // d_in
    tile = tiles.tile_for(arch, "dot", tokens, sum(ranks), words_of(d_in))
    return triton_stack.binary_low_rank_linears(x, *lists, tile)


def works(name: str, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the kernel gives the reference's result for about so many tokens on this device."""
    count = min(t for t in TRIALS if t >= min(tokens, TRIALS[-1]))

    def attempt() -> tuple[Tensor, Tensor]:
        args = trial(device, dtype, count)
        exact = (t.double() if t.is_floating_point() else t for t in args[:-1])
        return run(name, *args), reference.binary_low_rank_linear(*exact, args[-1])

    return trusted(f"{name}, {dtype}, {count} tokens", device, attempt)


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
