"""The operator ``nanoquant::product_linear``: a linear whose weight is looked up in codebooks.

Few tokens are looked up in tables of products on a CPU, or multiply on a GPU with what Triton looks up in registers;
else the reference makes some rows dense at a time. Differentiable in x, codebooks, scales and bias, not in indices.
The layout is that of :mod:`nanoquant_kernels.product`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant_kernels import cpu_product, product
from nanoquant_kernels.cards import trusted, unavailable
from nanoquant_kernels.cpu_build import available_paths
from nanoquant_kernels.indices import WIDTHS, index_bytes
from nanoquant_kernels.reference import sum_tokens

NAME = "nanoquant::product_linear"

_library = torch.library.Library("nanoquant", "FRAGMENT")
_library.define(
    "product_linear(Tensor x, Tensor indices, Tensor codebook, Tensor? indices2, Tensor? codebook2, "
    "Tensor scale, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_arguments(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> None:
    """Raise ValueError naming the first argument whose shape or dtype does not fit the others."""
    if scale.dim() != 1 or x.dim() < 1:
        raise ValueError(
            f"scale must be a vector and x have a last dimension, got shapes {tuple(scale.shape)} and "
            f"{tuple(x.shape)}"
        )
    d_out, d_in = scale.shape[0], x.shape[-1]
    if min(d_out, d_in) < 1:
        raise ValueError(f"d_out and d_in must be at least 1, got {d_out} and {d_in}")
    if (indices2 is None) != (codebook2 is None):
        raise ValueError("a second stage has both indices2 and codebook2; give both or none")
    _check_stage(indices, codebook, d_out, d_in, "")
    if indices2 is not None:
        _check_stage(indices2, codebook2, d_out, d_in, "2")
        if codebook2.shape[::2] != codebook.shape[::2]:
            raise ValueError(
                f"codebook2 has shape {tuple(codebook2.shape)}, but slabs and group must be those of the codebook's "
                f"{tuple(codebook.shape)}"
            )
    reals = {"x": x, "codebook": codebook, "codebook2": codebook2, "scale": scale, "bias": bias}
    for name, tensor in reals.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (reals | {"indices": indices, "indices2": indices2}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but x on {x.device}; move one to the other"
            )
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but scale asks for ({d_out},)")


def _check_stage(indices: Tensor, codebook: Tensor, d_out: int, d_in: int, stage: str) -> None:
    """The same for one stage; ``stage`` ends the names of its arguments."""
    allowed = [2**width for width in WIDTHS]
    if codebook.dim() != 3 or codebook.shape[1] not in allowed or min(codebook.shape) < 1:
        raise ValueError(
            f"codebook{stage} must be (slabs, entries, group) with {', '.join(map(str, allowed))} entries, got shape "
            f"{tuple(codebook.shape)}"
        )
    R, K, g = codebook.shape
    if d_out % R:
        raise ValueError(f"codebook{stage} has {R} slabs, which do not divide {d_out} rows")
    wanted = (d_out, index_bytes(-(-d_in // g), K.bit_length() - 1))
    if indices.dtype != torch.uint8 or indices.shape != wanted:
        raise ValueError(
            f"indices{stage} must be uint8 {wanted} for {d_in} inputs in groups of {g} and {K} entries, got "
            f"{indices.dtype} {tuple(indices.shape)}; see pack_indices"
        )


@torch.library.impl(_library, "product_linear", "CompositeExplicitAutograd")
def _reference(x: Tensor, *weight: Tensor | None) -> Tensor:
    """Any device without a kernel of its own."""
    check_arguments(x, *weight)
    return product.product_linear(x, *weight)


@torch.library.impl(_library, "product_linear", "CPU")
def _cpu(x: Tensor, *weight: Tensor | None) -> Tensor:
    """The compiled loop where it serves, else the reference."""
    check_arguments(x, *weight)
    implementation = cpu_product if cpu_product.serves(x, *weight) else product
    return implementation.product_linear(x, *weight)


@torch.library.impl(_library, "product_linear", "CUDA")
def _cuda(x: Tensor, *weight: Tensor | None) -> Tensor:
    """The Triton kernel where it serves and can be trusted, else the reference."""
    check_arguments(x, *weight)
    if not _triton_serves(x, *weight):
        return product.product_linear(x, *weight)
    from nanoquant_kernels import triton_product

    with torch.cuda.device(x.device):  # Triton launches on the current one
        return triton_product.product_linear(x, *weight)


def _triton_serves(x: Tensor, *weight: Tensor | None) -> bool:
    """Whether the Triton kernel takes these arguments, and has passed its trial on their GPU."""
    if unavailable(x.device):
        return False
    from nanoquant_kernels import triton_product

    stages = product.stages_of(*weight[:4])
    widths, group = tuple(s.width for s in stages), stages[0].codebook.shape[2]

    def attempt() -> tuple[Tensor, Tensor]:
        args = triton_product.trial(x.device, x.dtype, widths, group)
        exact = (t.double() if t is not None and t.is_floating_point() else t for t in args)
        return triton_product.product_linear(*args), product.product_linear(*exact)

    with torch.cuda.device(x.device):
        kernel = "product", widths, group, x.dtype
        return triton_product.serves(x) and trusted(kernel, x.device, attempt)


def kernel_of(x: Tensor, *weight: Tensor | None) -> str:
    """What runs for these arguments of the operator: a path of the C++ loop, "triton" or "reference"."""
    if x.is_cuda:
        return "triton" if _triton_serves(x, *weight) else "reference"
    return available_paths()[-1] if cpu_product.serves(x, *weight) else "reference"


@torch.library.register_fake(NAME, lib=_library)
def _fake(x: Tensor, *weight: Tensor | None) -> Tensor:
    """Shape and dtype of the result, for meta tensors and torch.compile."""
    check_arguments(x, *weight)
    return x.new_empty((*x.shape[:-1], weight[4].shape[0]))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Keep the inputs; the weight is cheaper to look up again than to hold."""
    *tensors, bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, codebooks, scale and bias."""
    x, *lookups, scale = ctx.saved_tensors
    needs_x, _, first, _, second, needs_scale, needs_bias = ctx.needs_input_grad
    found = product.product_linear_backward(
        grad, x, product.stages_of(*lookups), scale, needs_x, first or second or needs_scale
    )
    books = [*found.codebooks, None][:2]
    grad_bias = sum_tokens(grad, ctx.bias_dtype) if needs_bias else None
    return found.x, None, books[0], None, books[1], found.scale, grad_bias


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context, lib=_library)

_operator = torch.ops.nanoquant.product_linear.default


def product_linear(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    indices2: Tensor | None,
    codebook2: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Apply a product-quantized weight to ``x``, on any device.

    Differentiable in x, codebooks, scale and bias. Under autocast ``x`` is first cast to autocast's dtype, as for
    F.linear.

    Args:
        x: (..., d_in), floating point; the product is computed in its dtype.
        indices: uint8 (d_out, bytes) of the first stage, layout as in :mod:`nanoquant_kernels.indices`.
        codebook: (R, K, g) of the first stage.
        indices2: of the second stage, or None.
        codebook2: of the second stage, or None.
        scale: (d_out,).
        bias: (d_out,) or None.

    Returns:
        (..., d_out) in the dtype of ``x`` (autocast's, where that is on).

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    weight = (indices, codebook, indices2, codebook2, scale, bias)
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # autocast does not know meta
        return _operator(x, *weight)
    with torch.autocast(device, enabled=False):
        return _operator(x.to(torch.get_autocast_dtype(device)), *weight)
