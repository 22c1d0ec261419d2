"""The operator ``nanoquant::binary_low_rank_linears``: several packed linears of the same x, for inference.

On CUDA they share their launches where one kernel can take them all; elsewhere each runs alone. Its result is one
tensor that holds the members' outputs one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import gpu
from nanoquant_kernels.ops import binary_low_rank_linear, check_arguments
from nanoquant_kernels.outputs import parts, starts_of

_library = torch.library.Library("nanoquant", "FRAGMENT")
_library.define(
    "binary_low_rank_linears(Tensor x, Tensor[] u_signs, Tensor[] v_signs, Tensor[] s1, Tensor[] s2, "
    "Tensor?[] bias, int[] ranks) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "binary_low_rank_linears", "CompositeExplicitAutograd")
def _one_by_one(x: Tensor, *lists: list) -> Tensor:
    """Any device: each linear alone."""
    outs = [s1.shape[0] for s1 in lists[2]]
    flat = x.new_zeros(x.numel() // x.shape[-1] * starts_of(outs)[-1])
    for part, member in zip(parts(flat, x, outs), zip(*lists, strict=True), strict=True):
        part.copy_(binary_low_rank_linear(x, *member))
    return flat


@torch.library.impl(_library, "binary_low_rank_linears", "CUDA")
def _cuda(x: Tensor, *lists: list) -> Tensor:
    """Shared launches where a kernel serves."""
    for member in zip(*lists, strict=True):
        check_arguments(x, *member)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        chosen = gpu.plan_stacked(x, *lists)
        return _one_by_one(x, *lists) if chosen is None else gpu.run_stacked(chosen, x, *lists)


@torch.library.register_fake("nanoquant::binary_low_rank_linears", lib=_library)
def _fake(x: Tensor, *lists: list) -> Tensor:
    """Shape and dtype of the result."""
    for member in zip(*lists, strict=True):
        check_arguments(x, *member)
    outs = [s1.shape[0] for s1 in lists[2]]
    return x.new_empty(x.numel() // x.shape[-1] * starts_of(outs)[-1])


def binary_low_rank_linears(
    x: Tensor,
    u_signs: list[Tensor],
    v_signs: list[Tensor],
    s1: list[Tensor],
    s2: list[Tensor],
    bias: list[Tensor | None],
    ranks: list[int],
) -> list[Tensor]:
    """What :func:`nanoquant_kernels.binary_low_rank_linear` gives for each member, without gradients.

    Under autocast ``x`` is first cast to autocast's dtype.

    Args:
        x: (..., d_in), floating point.
        u_signs: of each member, uint8 (d_out, ceil(rank / 8)).
        v_signs: of each member, uint8 (rank, ceil(d_in / 8)).
        s1: of each member, (d_out,).
        s2: of each member, (d_in,).
        bias: of each member, (d_out,) or None.
        ranks: r of each member.

    Returns:
        A tensor (..., d_out) for each member, in the dtype of ``x``; they share storage.

    Raises:
        ValueError: lists of different lengths, gradients are wanted, or an argument does not fit.
    """
    lists = [list(values) for values in (u_signs, v_signs, s1, s2, bias, ranks)]
    lengths = {len(values) for values in lists}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"give as many of everything, one or more; got {list(map(len, lists))}")
    reals = (x, *lists[2], *lists[3], *(b for b in lists[4] if b is not None))
    if torch.is_grad_enabled() and any(t.requires_grad for t in reals):
        raise ValueError("shared launches have no gradients; call each linear, or use no_grad")
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return binary_low_rank_linears(x, *lists)
    flat = torch.ops.nanoquant.binary_low_rank_linears.default(x, *lists)
    return parts(flat, x, [s.shape[0] for s in lists[2]])
