"""The operator ``nanoquant::binary_low_rank_linear_int8``: a packed linear with 8-bit activations, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import cpu_int8, int8_reference
from nanoquant_kernels.ops import check_arguments

NAME = "nanoquant::binary_low_rank_linear_int8"

_library = torch.library.Library("nanoquant", "FRAGMENT")
_library.define(
    "binary_low_rank_linear_int8(Tensor x, Tensor u_signs, Tensor v_signs, Tensor s1, Tensor s2, "
    "Tensor? bias, int rank) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "binary_low_rank_linear_int8", "CompositeExplicitAutograd")
def _reference(x: Tensor, *weight: Tensor | int | None) -> Tensor:
    """Any device without a kernel of its own."""
    check_arguments(x, *weight)
    return int8_reference.binary_low_rank_linear_int8(x, *weight)


@torch.library.impl(_library, "binary_low_rank_linear_int8", "CPU")
def _cpu(x: Tensor, *weight: Tensor | int | None) -> Tensor:
    """The compiled loop where it serves, else the reference."""
    check_arguments(x, *weight)
    _, _, s1, s2, bias, _ = weight
    implementation = cpu_int8 if cpu_int8.serves(x, s1, s2, bias) else int8_reference
    return implementation.binary_low_rank_linear_int8(x, *weight)


@torch.library.register_fake(NAME, lib=_library)
def _fake(x: Tensor, *weight: Tensor | int | None) -> Tensor:
    """Shape and dtype of the result, for meta tensors and torch.compile."""
    check_arguments(x, *weight)
    return x.new_empty((*x.shape[:-1], weight[2].shape[0]))


_operator = torch.ops.nanoquant.binary_low_rank_linear_int8.default


def binary_low_rank_linear_int8(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """As :func:`nanoquant_kernels.binary_low_rank_linear`, but with the inputs of both stages rounded to 8 bits.

    Faster on CPUs; without gradients. Under autocast ``x`` is first cast to autocast's dtype.

    Args:
        x: (..., d_in), floating point; a token that holds inf or NaN gives NaN.
        u_signs: uint8 (d_out, ceil(rank / 8)), rows of U; layout as in
            :mod:`nanoquant_kernels.layout`.
        v_signs: uint8 (rank, ceil(d_in / 8)), columns of V.
        s1: (d_out,) output scales.
        s2: (d_in,) input scales.
        bias: (d_out,) or None.
        rank: r.

    Returns:
        (..., d_out) in the dtype of ``x`` (autocast's, where that is on).

    Raises:
        ValueError: gradients are wanted, or a shape or dtype does not fit; the message names the argument.
    """
    wanted = (t is not None and t.requires_grad for t in (x, s1, s2, bias))
    if torch.is_grad_enabled() and any(wanted):
        raise ValueError("8-bit activations have no gradients; use no_grad, or exact activations")
    weight = (u_signs, v_signs, s1, s2, bias, rank)
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # autocast does not know meta
        return _operator(x, *weight)
    with torch.autocast(device, enabled=False):
        return _operator(x.to(torch.get_autocast_dtype(device)), *weight)
