"""The operator ``nanoquant::binary_low_rank_linears``: several packed linears of the same x, for inference.

On CUDA they share their launches where one kernel can take them all; elsewhere each runs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import gpu
from nanoquant_kernels.ops import binary_low_rank_linear, check_arguments

_library = torch.library.Library("nanoquant", "FRAGMENT")
_library.define(
    "binary_low_rank_linears(Tensor x, Tensor[] u_signs, Tensor[] v_signs, Tensor[] s1, Tensor[] s2, "
    "Tensor?[] bias, int[] ranks) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "binary_low_rank_linears", "CompositeExplicitAutograd")
def _one_by_one(x: Tensor, *lists: object) -> list[Tensor]:
    """Any device: each linear alone."""
    return [binary_low_rank_linear(x, *member) for member in zip(*lists, strict=True)]


@torch.library.impl(_library, "binary_low_rank_linears", "CUDA")
def _cuda(x: Tensor, *lists: object) -> list[Tensor]:
    """Shared launches where a kernel serves."""
    for member in zip(*lists, strict=True):
        check_arguments(x, *member)
    if gpu.can_stack(x, *lists):
        return gpu.run_stacked(x, *lists)
    return _one_by_one(x, *lists)


@torch.library.register_fake("nanoquant::binary_low_rank_linears", lib=_library)
def _fake(x: Tensor, *lists: object) -> list[Tensor]:
    """Shapes and dtypes of the results."""
    for member in zip(*lists, strict=True):
        check_arguments(x, *member)
    return [x.new_empty((*x.shape[:-1], s1.shape[0])) for s1 in lists[2]]


def binary_low_rank_linears(x: Tensor, *lists: object) -> list[Tensor]:
    """What :func:`nanoquant_kernels.binary_low_rank_linear` gives for each member, without gradients.

    Args:
        x: (..., d_in), floating point.
        *lists: u_signs, v_signs, s1, s2, bias and rank of the members, a list each.

    Returns:
        A tensor (..., d_out) for each member, in the dtype of ``x``.
    """
    return torch.ops.nanoquant.binary_low_rank_linears.default(x, *map(list, lists))
