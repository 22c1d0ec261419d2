"""The operator ``nanoquant::binary_low_rank_linear`` with checks, fake kernel and autograd.

Registered through ``torch.library.Library``, whose calls cost less than half of a ``custom_op``;
kernels of a device register themselves under that device's dispatch key and take precedence over
the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import compiled, cpu, gpu, reference
from nanoquant_kernels.layout import packed_width

NAME = "nanoquant::binary_low_rank_linear"

_library = torch.library.Library("nanoquant", "DEF")
_library.define(
    "binary_low_rank_linear(Tensor x, Tensor u_signs, Tensor v_signs, Tensor s1, Tensor s2, "
    "Tensor? bias, int rank) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> None:
    """Raise ValueError naming the first argument whose shape or dtype does not fit the others."""
    if s1.dim() != 1 or s2.dim() != 1:
        raise ValueError(
            f"s1 and s2 must be vectors, got shapes {tuple(s1.shape)} and {tuple(s2.shape)}"
        )
    d_out, d_in = s1.shape[0], s2.shape[0]
    if x.dim() < 1 or x.shape[-1] != d_in:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but its last dimension must be {d_in}, the length of s2"
        )
    if u_signs.shape != (d_out, packed_width(rank)):
        raise ValueError(
            f"u_signs has shape {tuple(u_signs.shape)}, but rank {rank} and s1 of length {d_out} "
            f"ask for ({d_out}, {packed_width(rank)}) bytes"
        )
    if v_signs.shape != (rank, packed_width(d_in)):
        raise ValueError(
            f"v_signs has shape {tuple(v_signs.shape)}, but rank {rank} and s2 of length {d_in} "
            f"ask for ({rank}, {packed_width(d_in)}) bytes"
        )
    if min(d_out, d_in, rank) < 1:
        raise ValueError(f"d_out, d_in and rank must be at least 1, got {d_out}, {d_in}, {rank}")
    others = {"u_signs": u_signs, "v_signs": v_signs, "s1": s1, "s2": s2, "bias": bias}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but x on {x.device}; move one to the other"
            )
    for name, signs in (("u_signs", u_signs), ("v_signs", v_signs)):
        if signs.dtype != torch.uint8:
            raise ValueError(
                f"{name} must be uint8 (eight signs a byte), got {signs.dtype}; see pack_signs"
            )
    for name, real in (("x", x), ("s1", s1), ("s2", s2), ("bias", bias)):
        if real is not None and not real.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {real.dtype}")
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but s1 asks for ({d_out},)")


@torch.library.impl(_library, "binary_low_rank_linear", "CompositeExplicitAutograd")
def _reference(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """Any device without a kernel of its own."""
    check_arguments(x, u_signs, v_signs, s1, s2, bias, rank)
    return reference.binary_low_rank_linear(x, u_signs, v_signs, s1, s2, bias, rank)


@torch.library.impl(_library, "binary_low_rank_linear", "CPU")
def _cpu(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """The extension's loop where it serves, else generated code where there is no extension, else the reference."""
    check_arguments(x, u_signs, v_signs, s1, s2, bias, rank)
    implementation = reference
    if cpu.serves(x, s1, s2, bias):
        implementation = cpu
    elif not cpu.exists() and compiled.serves(x, s1.shape[0], rank):
        implementation = compiled
    return implementation.binary_low_rank_linear(x, u_signs, v_signs, s1, s2, bias, rank)


@torch.library.impl(_library, "binary_low_rank_linear", "CUDA")
def _cuda(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """The Triton kernel that serves, else the reference."""
    check_arguments(x, u_signs, v_signs, s1, s2, bias, rank)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        return gpu.binary_low_rank_linear(x, u_signs, v_signs, s1, s2, bias, rank)


@torch.library.register_fake(NAME, lib=_library)
def _fake(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """Shape and dtype of the result, for meta tensors and torch.compile."""
    check_arguments(x, u_signs, v_signs, s1, s2, bias, rank)
    return x.new_empty((*x.shape[:-1], s1.shape[0]))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Keep the inputs; intermediate products are cheaper to compute again than to hold."""
    x, u_signs, v_signs, s1, s2, bias, rank = inputs
    ctx.save_for_backward(x, u_signs, v_signs, s1, s2)
    ctx.rank = rank
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, s1, s2 and bias; the signs have none."""
    x, u_signs, v_signs, s1, s2 = ctx.saved_tensors
    needs_x, _, _, needs_s1, needs_s2, needs_bias, _ = ctx.needs_input_grad
    grad_x, grad_s1, grad_s2 = reference.binary_low_rank_linear_backward(
        grad, x, u_signs, v_signs, s1, s2, ctx.rank, (needs_x, needs_s1, needs_s2)
    )
    grad_bias = reference.sum_tokens(grad, ctx.bias_dtype) if needs_bias else None
    return grad_x, None, None, grad_s1, grad_s2, grad_bias, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context, lib=_library)

_operator = torch.ops.nanoquant.binary_low_rank_linear.default


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """Apply the weight diag(s1) U V^T diag(s2) with packed signs to ``x``, on any device.

    Differentiable in x, s1, s2 and bias. Under autocast ``x`` is first cast to autocast's dtype, as
    for F.linear.

    Args:
        x: (..., d_in), floating point; the product is computed in its dtype.
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
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # autocast does not know meta
        return _operator(x, u_signs, v_signs, s1, s2, bias, rank)
    x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _operator(x, u_signs, v_signs, s1, s2, bias, rank)
