"""KL divergence between the logits of a teacher and a student, a few tokens at a time (Eq. 11, T = 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanoquant.compiling import uncompiled

Piece = Callable[[Tensor, Tensor, int | None], tuple[Tensor, Tensor | None]]


def divergence_piece(
    student: Tensor, teacher: Tensor, tokens: int | None
) -> tuple[Tensor, Tensor | None]:
    """Summed KL(teacher || student) of logits (n, vocabulary) in float32, and its gradient divided by ``tokens``.

    The gradient has the dtype of the student's logits; there is none where ``tokens`` is None.
    """
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p = log_p.exp()
    total = p.mul(log_p - log_q).sum()
    if tokens is None:
        return total, None
    return total, ((log_q.exp() - p) / tokens).to(student.dtype)


class ForwardKL(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student), a few tokens at a time in float32 (Eq. 11, T = 1).

    The gradient is formed with the loss, in the dtype of the student's logits, so that no float32 tensor of
    tokens x vocabulary exists.
    """

    chunk = 32

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        piece: Piece = divergence_piece,
    ) -> Tensor:
        """Divergence of logits (tokens, vocabulary); ``piece`` may be a compiled :func:`divergence_piece`."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else student
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        pieces = (x.split(ForwardKL.chunk) for x in (student, teacher, gradient))
        for s, t, g in zip(*pieces, strict=True):
            divergence, slope = piece(s, t, len(student) if wanted else None)
            total += divergence
            if wanted:
                g.copy_(slope)
        if wanted:
            ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        """Gradient for the student's logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def logits_divergence(
    student: nn.Module, teacher: nn.Module, windows: Tensor, piece: Piece = divergence_piece
) -> Tensor:
    """KL(teacher || student) per token on windows (n, T); differentiable in the student."""
    with torch.no_grad():
        reference = teacher(input_ids=windows, use_cache=False).logits.flatten(0, 1)
    logits = student(input_ids=windows, use_cache=False).logits.flatten(0, 1)
    return ForwardKL.apply(logits, reference, piece)


@torch.no_grad()
def held_out_divergence(
    student: nn.Module, teacher: nn.Module, windows: Tensor, precision: str
) -> float:
    """Mean KL(teacher || student) per token over windows (N, T), one window at a time.

    Args:
        student: in whatever state it is.
        teacher: on the same device.
        windows: token ids, moved to that device.
        precision: Lightning precision under which the student trains.
    """
    device = next(student.parameters()).device
    mixed = precision == "bf16-mixed"
    with uncompiled(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
        losses = [
            float(logits_divergence(student, teacher, window.to(device)))
            for window in windows.split(1)
        ]
    return sum(losses) / len(losses)
