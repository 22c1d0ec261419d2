"""Blocks that keep nothing of a forward pass: the backward pass runs each again when its turn comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoquant.decoder import call_block, replaced_forwards, split_call
from nanoquant.heap import give_back


def recomputed(blocks: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """While active, each block first runs without gradients, and again, with them, in the backward pass.

    Between the two only its hidden states are kept, so that activations of one block at a time are in memory, for a
    third of the time of forward and backward more. Gradients reach the block's parameters and hidden states, and no
    other argument.

    Args:
        blocks: decoder blocks of a model in evaluation mode.
    """
    return replaced_forwards((block, _again(block.forward)) for block in blocks)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block, run anew in the backward pass."""

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        hidden, call = split_call(args, kwargs)

        def inner(hidden: Tensor) -> Any:  # noqa: ANN401
            if torch.is_grad_enabled() and hidden.device.type == "cpu":
                give_back()  # what the block before it freed
            return call_block(forward, hidden, call)

        if not torch.is_grad_enabled():
            return inner(hidden)
        if not hidden.requires_grad:  # else checkpoint would give the parameters no gradients
            hidden = hidden.detach().requires_grad_()
        return checkpoint(inner, hidden, use_reentrant=True, preserve_rng_state=False)

    return run
