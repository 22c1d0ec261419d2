"""How far a model is from the dense one, on the windows of its perplexity: KL divergence and the same first choice.

Both models run one window at a time; besides the logits of that window in the models' own dtypes, float32 exists
only for a few tokens. The two perplexities fall out of the same passes.

Shapes: N windows, T tokens a window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoquant.evaluation.perplexity import (
    Perplexity,
    Progress,
    batches,
    check_length,
    check_windows,
    log_sum_exp,
    logit_chunks,
    make_perplexity,
    window_logits,
)


@dataclass(frozen=True, eq=False)
class Agreement:
    """A model beside the dense one, over the T - 1 predicted tokens of every window."""

    model: Perplexity
    dense: Perplexity
    kl: Tensor
    """KL(dense || model) of every window in nats, mean over its tokens (N,), float64."""
    top1: Tensor
    """Share of the tokens of every window for which both models' first choice is the same (N,), float64."""


def agreement(
    model: nn.Module, dense: nn.Module, windows: Tensor, progress: Progress | None = None
) -> Agreement:
    """Measure both models on windows (N, T) of token ids.

    Args:
        model: causal language model.
        dense: the model it is compared with, of the same vocabulary; may be on another device.
        windows: token ids.
        progress: called with (windows done, windows in all) after each.

    Raises:
        ValueError: windows that do not fit a model, other vocabularies, or logits that are not finite.
    """
    check_windows(windows)
    for one in (model, dense):
        check_length(one, windows.shape[1])
    sums = [
        _window(window_logits(model, window)[0], window_logits(dense, window)[0], window[0], number)
        for number, window in enumerate(batches(windows, 1, progress))
    ]
    nll, dense_nll, kl, top1 = torch.stack(sums).T  # (N,) each
    predicted = windows.shape[1] - 1
    return Agreement(
        model=make_perplexity(nll, len(nll) * predicted),
        dense=make_perplexity(dense_nll, len(nll) * predicted),
        kl=kl / predicted,
        top1=top1 / predicted,
    )


def _window(logits: Tensor, dense_logits: Tensor, ids: Tensor, number: int) -> Tensor:
    """Sums over the tokens of one window (4,): nll of both, KL(dense || model), equal first choices; float64."""
    if logits.shape != dense_logits.shape:
        raise ValueError(
            f"the models have vocabularies of {logits.shape[1]} and {dense_logits.shape[1]} tokens, so their "
            "predictions can't be compared; give the dense model that this one was made from"
        )
    total = torch.zeros(4, dtype=torch.float64)
    pairs = logit_chunks(logits[:-1], dense_logits[:-1], ids[1:])
    for q, p, target in pairs:
        p = p.to(q.device)
        same = q.argmax(-1) == p.argmax(-1)
        index = target.to(q.device)[:, None]
        log_q = q - log_sum_exp(q, number)[:, None]  # (chunk, V)
        log_p = p - log_sum_exp(p, number)[:, None]
        q_sum, p_sum = (-x.gather(1, index).double().sum() for x in (log_q, log_p))
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p)
        divergence[p == 0] = 0  # the limit; a token that both mask would give NaN
        parts = [q_sum, p_sum, divergence.sum(-1).double().sum(), same.sum().double()]
        total += torch.stack(parts).cpu()
    return total
