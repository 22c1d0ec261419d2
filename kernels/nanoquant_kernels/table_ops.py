"""The operator ``nanoquant::table_linear``: the head's product with a table of 8-bit or 4-bit codes.

Few tokens multiply with the codes themselves: on a CPU by the compiled loop of ``cpu_table.cpp``, or for 8 bits by
PyTorch's own kernel where there is no compiler; on a GPU by Triton. Else the reference makes some rows dense at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import table
from nanoquant_kernels.cards import trusted, unavailable
from nanoquant_kernels.cpu import SIGNS_A_THREAD as WORK_A_THREAD
from nanoquant_kernels.cpu import TYPES
from nanoquant_kernels.cpu_build import PATHS, available_paths, library
from nanoquant_kernels.reference import sum_tokens

NAME = "nanoquant::table_linear"
MOST_TOKENS = {"plain": 2, "avx2": 16, "neon": 8, "avx512": 32}
"""Tokens up to which a path is faster than making rows dense."""

_library = torch.library.Library("nanoquant", "FRAGMENT")
_library.define(
    "table_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> None:
    """Raise ValueError naming the first argument whose shape or dtype does not fit the others."""
    if codes.dtype not in (torch.int8, torch.uint8) or codes.dim() != 2:
        raise ValueError(
            "codes must be a matrix of int8 (8 bits) or uint8 (two of 4 bits a byte), got "
            f"{codes.dtype} of shape {tuple(codes.shape)}"
        )
    n, width = codes.shape
    d = width if codes.dtype == torch.int8 else 2 * width
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != d:
        raise ValueError(
            f"x must be floating point with a last dimension of {d}, as the table has columns; got "
            f"{x.dtype} of shape {tuple(x.shape)}"
        )
    if codes.dtype == torch.int8:
        fits = scales.shape == (n, 1) and zeros is None
    else:
        groups = scales.shape[-1] if scales.dim() == 2 else 0
        fits = groups > 0 and d % (groups * table.COLUMNS) == 0 and scales.shape == (n, groups)
        fits = fits and zeros is not None and zeros.shape == scales.shape
        fits = fits and zeros.dtype == torch.int8
    if not fits or not scales.is_floating_point():
        found = None if zeros is None else (zeros.dtype, tuple(zeros.shape))
        raise ValueError(
            f"scales {scales.dtype} {tuple(scales.shape)} and zeros {found} do not fit codes "
            f"{codes.dtype} {tuple(codes.shape)}; see nanoquant_kernels.table"
        )
    others = {"codes": codes, "scales": scales, "zeros": zeros, "bias": bias}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but x on {x.device}; move one to the other"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but the table asks for ({n},)")


@torch.library.impl(_library, "table_linear", "CompositeExplicitAutograd")
def _reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Any device without a kernel of its own."""
    check_arguments(x, codes, scales, zeros, bias)
    return table.table_linear(x, codes, scales, zeros, bias)


@torch.library.impl(_library, "table_linear", "CPU")
def _cpu(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The compiled loop where it serves, else PyTorch's kernel for 8 bits, else the reference."""
    check_arguments(x, codes, scales, zeros, bias)
    if serves(x, scales, bias):
        return cpu_table_linear(x, codes, scales, zeros, bias)
    if zeros is None and scales.dtype == x.dtype == torch.bfloat16 and x.numel() <= 4 * x.shape[-1]:
        return int8_linear(x, codes, scales, bias)
    return table.table_linear(x, codes, scales, zeros, bias)


@torch.library.impl(_library, "table_linear", "CUDA")
def _cuda(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The Triton kernel where it serves and can be trusted, else the reference."""
    check_arguments(x, codes, scales, zeros, bias)
    if not unavailable(x.device):
        from nanoquant_kernels import triton_table

        bits = 8 if zeros is None else 4

        def attempt() -> tuple[Tensor, Tensor]:
            args = triton_table.trial(x.device, x.dtype, bits)
            exact = (t.double() if t is not None and t.is_floating_point() else t for t in args)
            return triton_table.table_linear(*args), table.table_linear(*exact)

        with torch.cuda.device(x.device):  # Triton launches on the current one
            kernel = f"{bits}-bit table", x.dtype
            if triton_table.serves(x) and trusted(kernel, x.device, attempt):
                return triton_table.table_linear(x, codes, scales, zeros, bias)
    return table.table_linear(x, codes, scales, zeros, bias)


def serves(x: Tensor, scales: Tensor, bias: Tensor | None) -> bool:
    """Whether the compiled loop takes these arguments: few tokens, and dtypes that it knows."""
    paths = available_paths()
    if not paths or any(t is not None and t.dtype not in TYPES for t in (x, scales, bias)):
        return False
    return x.numel() <= MOST_TOKENS[paths[-1]] * x.shape[-1]


def cpu_table_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    path: str | None = None,
) -> Tensor:
    """As :func:`nanoquant_kernels.table.table_linear`, by the compiled loop, in exact float32.

    Args:
        x: (..., d), see :func:`serves`.
        codes: int8 (n, d) or uint8 (n, d / 2).
        scales: (n, G).
        zeros: int8 (n, G) or None.
        bias: (n,) or None.
        path: name of an instruction path of this machine; none means the fastest.
    """
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    zeros, bias = (None if t is None else t.contiguous() for t in (zeros, bias))
    n, d = codes.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    tokens = x.numel() // d
    threads = max(1, min(torch.get_num_threads(), tokens * n * d // WORK_A_THREAD))
    library().nq_table(
        *(x.data_ptr(), TYPES[x.dtype], tokens, d),
        *(codes.data_ptr(), 8 if codes.dtype == torch.int8 else 4),
        *(scales.data_ptr(), TYPES[scales.dtype], scales.shape[1]),
        *(None if zeros is None else zeros.data_ptr(), n),
        *((None, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])),
        *(y.data_ptr(), PATHS.index(path or available_paths()[-1]), threads),
    )
    return y


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own product with int8 codes; on a CPU only bfloat16 is fast."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch._weight_int8pack_mm(flat, codes, scales.flatten()).view(*x.shape[:-1], len(codes))
    return y if bias is None else y + bias.to(x.dtype)


@torch.library.register_fake(NAME, lib=_library)
def _fake(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Shape and dtype of the result, for meta tensors and torch.compile."""
    check_arguments(x, codes, scales, zeros, bias)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Keep the table."""
    _, codes, scales, zeros, bias = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the table does not train."""
    needs_x, *_, needs_bias = ctx.needs_input_grad
    grad_x = table.table_linear_backward(grad, *ctx.saved_tensors) if needs_x else None
    grad_bias = sum_tokens(grad, ctx.bias_dtype) if needs_bias else None
    return grad_x, None, None, None, grad_bias


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context, lib=_library)

table_linear = torch.ops.nanoquant.table_linear.default
"""x (..., d), codes, scales, zeros or None, bias (n,) or None -> (..., n); layout as in nanoquant_kernels.table."""
