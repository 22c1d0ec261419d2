"""KL divergence between the logits of a teacher and a student, a few tokens at a time (Eq. 11, T = 1).

Of the teacher there may be less than its logits: for each token its k most probable tokens and their log-probabilities,
and the mass of all others in one bucket, so that a student that moves mass between the two is seen (not in the paper).
Hard labels, the text's own next tokens, may have a share of the target (Hinton et al., arXiv 1503.02531).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.compiling import uncompiled
from nanoquant.processes import divided

Piece = Callable[..., tuple[Tensor, Tensor | None]]

LEAST = torch.finfo(torch.float32).min
"""In the place of the logarithm of 0, which a product with 0 must leave 0."""


def divergence_piece(
    student: Tensor,
    teacher: Tensor,
    tokens: int | None,
    kept: Sequence[Tensor] = (),
    hard: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """Summed KL(teacher || student) of logits (n, vocabulary) in float32, and its gradient divided by ``tokens``.

    Args:
        student: its logits; the gradient has their dtype.
        teacher: its logits, or the first of what :func:`most_probable` gave.
        tokens: by which the gradient is divided; None: no gradient is formed.
        kept: what else :func:`most_probable` gave.
        hard: labels and their shares a, as of :func:`hard_labels`; the sum is then that of (1 - a) KL - a log q(label).
    """
    log_q = student.float().log_softmax(-1)
    wanted = tokens is not None
    if kept:
        divergence, slope = _bucket(log_q, teacher, *kept, wanted)
    else:
        divergence, slope = _whole(log_q, teacher, wanted)
    if hard:
        labels, share = hard
        divergence = (1 - share) * divergence - share * log_q.gather(-1, labels).clamp_min(LEAST)
        if wanted:
            slope = (1 - share) * slope + share * log_q.exp()
            slope = slope.scatter_add(-1, labels, -share)
    return divergence.sum(), (slope / tokens).to(student.dtype) if wanted else None


def _whole(log_q: Tensor, teacher: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """KL of each token (n, 1), and, where that is wanted, its gradient for the student's logits (n, vocabulary)."""
    log_p = teacher.float().log_softmax(-1)
    p = log_p.exp()
    divergence = p.mul(log_p - log_q).sum(-1, keepdim=True)
    return divergence, log_q.exp() - p if wanted else None


def hard_labels(windows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Next token of each token of windows (n, T), int64 (n * T, 1), and its share of the target, float32 (n * T, 1).

    The last token of a window has no next one: its share is 0, whatever its label is.
    """
    labels = windows.roll(-1, dims=-1).long()
    shares = torch.full(windows.shape, share, dtype=torch.float32, device=windows.device)
    shares[:, -1] = 0
    return labels.reshape(-1, 1), shares.reshape(-1, 1)


def most_probable(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of a teacher's logits (n, vocabulary).

    Returns:
        Log-probabilities (n, k) of the most probable tokens, the ids of these int32 (n, k), and the logarithm of the
        mass of all others (n,), -inf where there are none; float32.
    """
    log_p = logits.float().log_softmax(-1)
    most, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return most, ids.int(), rest


def _bucket(
    log_q: Tensor, log_p: Tensor, ids: Tensor, log_rest: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_whole`: sum over k of p (log p - log q), and the same for the mass of all others."""
    ids = ids.long()
    others = log_q.scatter(-1, ids, -torch.inf)  # (n, vocabulary)
    log_q_rest = others.logsumexp(-1, keepdim=True).clamp_min(LEAST)
    p, p_rest = log_p.exp(), log_rest.exp().unsqueeze(-1)
    divergence = p.mul(log_p - log_q.gather(-1, ids)).sum(-1, keepdim=True)
    divergence = divergence + p_rest * (log_rest.clamp_min(LEAST).unsqueeze(-1) - log_q_rest)
    if not wanted:
        return divergence, None
    mass = p.sum(-1, keepdim=True) + p_rest
    slope = mass * log_q.exp() - p_rest * (others - log_q_rest).exp()
    return divergence, slope.scatter_add(-1, ids, -p)


class ForwardKL(torch.autograd.Function):
    """Mean over tokens of what :func:`divergence_piece` sums, a few tokens at a time in float32 (Eq. 11, T = 1).

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
        kept: Sequence[Tensor] = (),
        hard: Sequence[Tensor] = (),
    ) -> Tensor:
        """Loss of logits (tokens, vocabulary), see :func:`divergence_piece`; ``piece`` may be a compiled one."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else student
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        pieces = (x.split(ForwardKL.chunk) for x in (student, gradient, teacher, *kept, *hard))
        for s, g, t, *more in zip(*pieces, strict=True):
            parts = tuple(more[: len(kept)]), tuple(more[len(kept) :])
            divergence, slope = piece(s, t, len(student) if wanted else None, *parts)
            total += divergence
            if wanted:
                g.copy_(slope)
        if wanted:
            ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradient for the student's logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


def logits_divergence(
    student: nn.Module,
    teacher: Callable[..., Any] | None,
    batch: Sequence[Tensor],
    piece: Piece = divergence_piece,
    share: float = 0.0,
) -> Tensor:
    """KL(teacher || student) per token, or its mixture with hard labels; differentiable in the student.

    Args:
        student: gives logits.
        teacher: gives logits where the batch has nothing of it.
        batch: windows (n, T), alone or with what :func:`most_probable` kept of them, (n, T, ...) each.
        piece: see :class:`ForwardKL`.
        share: of the text's own next token in the target, see :func:`hard_labels`.
    """
    windows, *known = batch
    if not known:
        with torch.no_grad():
            known = [teacher(input_ids=windows, use_cache=False).logits]
    logits = student(input_ids=windows, use_cache=False).logits.flatten(0, 1)
    first, *kept = (tensor.flatten(0, 1) for tensor in known)
    hard = hard_labels(windows, share) if share else ()
    return ForwardKL.apply(logits, first, piece, tuple(kept), hard)


@torch.no_grad()
def held_out_divergence(
    student: nn.Module,
    teacher: Callable[..., Any] | None,
    windows: Iterable[Sequence[Tensor]],
    precision: str,
    idle: Callable[[], object] | None = None,
) -> float:
    """Mean KL(teacher || student) per token over windows, one window at a time.

    Args:
        student: in whatever state it is.
        teacher: on the same device, see :func:`logits_divergence`.
        windows: batches of one window, moved to that device.
        precision: Lightning precision under which the student trains.
        idle: see :func:`divided`.
    """
    device = next(student.parameters()).device
    mixed = precision == "bf16-mixed"
    with uncompiled(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
        losses = divided(
            lambda batch: float(logits_divergence(student, teacher, [x.to(device) for x in batch])),
            windows,
            idle,
        )
    return sum(losses) / len(losses)
