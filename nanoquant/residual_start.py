"""A start for LoRA that takes back a part of what quantization did to each weight, as the weight's inputs see it.

With the error R = W - W_packed and the inputs X of some windows, B A = share U U^T R, where U holds the leading left
singular vectors of R X^T: at share 1 no matrices of that rank leave less error in the outputs (the idea of EoRA, arXiv
2410.21271). Errors of a model that was tuned as a whole make good for each other, so that a part beats the whole, and
held-out windows choose the share. Shapes: n tokens, rank r, k columns of a sketch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from nanoquant.packed_layers import Packed

logger = logging.getLogger(__name__)

SHARES = (0.1, 0.2, 0.4, 0.8)
"""Shares of the error that are tried beside none."""
WINDOWS = 8
"""Windows whose inputs count, at most."""
SPARE = 8
"""Columns of the sketch beyond the rank."""


class Pair(NamedTuple):
    """A packed linear, its dense weight (d_out, d_in), and the low-rank matrices A (r, d_in) and B (d_out, r)."""

    packed: Packed
    W: Tensor
    A: nn.Parameter
    B: nn.Parameter


@torch.no_grad()
def residual_start(
    student: nn.Module, teacher: nn.Module, windows: Tensor, measure: Callable[[], float]
) -> dict[float, float]:
    """Set the low-rank matrices to the best start, none among them.

    Args:
        student: a ``PeftModel`` with new LoRA beside packed linears, whose second matrices are 0.
        teacher: the dense model that it was made from.
        windows: tokens (N, T), of which the first WINDOWS are used.
        measure: gives the held-out loss of the student as it is.

    Returns:
        Held-out loss by share.

    Raises:
        ValueError: the teacher has no linear of a name and shape of the student's.
    """
    pairs = find_pairs(student.get_base_model(), teacher)
    losses = {0.0: measure()}
    sketches = sketch_errors(student, pairs, windows[:WINDOWS])
    if not all(sketch.isfinite().all() for sketch in sketches):
        logger.warning("the error of a packed weight is not finite; LoRA starts at zero")
        return losses
    before, leading = [pair.A.clone() for pair in pairs], directions(pairs, sketches)
    starts = [(U, U.T @ error_of(pair)) for pair, U in zip(pairs, leading, strict=True)]

    def put(share: float) -> None:
        for pair, A, (U, low) in zip(pairs, before, starts, strict=True):
            pair.A.copy_(share**0.5 * low if share else A)
            pair.B.copy_(share**0.5 * U)  # zeros where there is no share

    for share in SHARES:
        put(share)
        losses[share] = measure()
    best = min(losses, key=losses.__getitem__)
    put(best)
    logger.info(
        "start: %g of the error is taken back, held-out loss %.4f after %.4f",
        best,
        losses[best],
        losses[0.0],
    )
    return losses


def find_pairs(model: nn.Module, teacher: nn.Module) -> list[Pair]:
    """The packed linears of a model that have LoRA, with their dense weights; raises as :func:`dense_weight`."""
    pairs = []
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and isinstance(layer.base_layer, Packed):
            W = dense_weight(teacher, name, layer.base_layer)
            (A,), (B,) = layer.lora_A.values(), layer.lora_B.values()
            pairs.append(Pair(layer.base_layer, W, A.weight, B.weight))
    return pairs


def dense_weight(teacher: nn.Module, name: str, packed: Packed) -> Tensor:
    """Weight W (d_out, d_in) of the linear that a packed one was made from.

    Raises:
        ValueError: the teacher has none of that name and shape.
    """
    found = dict(teacher.named_modules()).get(name)
    weight = getattr(found, "weight", None)
    W = weight.T if isinstance(found, Conv1D) else weight
    if W is None or W.shape != (packed.out_features, packed.in_features):
        raise ValueError(
            f"the teacher has no linear {name} of {packed.out_features} x {packed.in_features}, so the error of "
            "the packed one is unknown; give the model that the checkpoint was made from, or start=zero"
        )
    return W.detach()


def error_of(pair: Pair) -> Tensor:
    """R = W - W_packed (d_out, d_in), float32."""
    return pair.W.float() - pair.packed.dequantize().float()


def sketch_errors(student: nn.Module, pairs: list[Pair], windows: Tensor) -> list[Tensor]:
    """E^T E G (d_out, k) of every pair over windows (N, T), from one pass: E = X R^T, G random."""
    generator = torch.Generator().manual_seed(0)
    sketches = [
        torch.zeros(pair.packed.out_features, len(pair.A) + SPARE, device=pair.A.device)
        for pair in pairs
    ]

    def add(pair: Pair, G: Tensor, sketch: Tensor, _: nn.Module, args: tuple, y: Tensor) -> None:
        x, y = args[0].flatten(0, -2), y.flatten(0, -2)  # (n, d_in), (n, d_out)
        E = F.linear(x, pair.W.to(x.dtype), pair.packed.bias).float() - y.float()
        sketch += E.T @ (E @ G)

    handles = []
    for pair, sketch in zip(pairs, sketches, strict=True):
        G = torch.randn(sketch.shape, generator=generator).to(sketch.device)
        handles.append(pair.packed.register_forward_hook(partial(add, pair, G, sketch)))
    try:
        for window in windows:
            student(input_ids=window.unsqueeze(0).to(student.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sketches


def directions(pairs: list[Pair], sketches: list[Tensor]) -> list[Tensor]:
    """Leading left singular vectors U (d_out, r) of R X^T, which are those of the sketches."""
    found = [torch.linalg.svd(sketch, full_matrices=False).U for sketch in sketches]
    # cut to r columns, or filled up with zeros where the rank is above d_out
    return [F.pad(U, (0, len(pair.A) - U.shape[1])) for pair, U in zip(pairs, found, strict=True)]
