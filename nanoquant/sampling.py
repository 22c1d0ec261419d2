"""Text that a model writes itself: many windows at once, token by token, over a cache that is allocated once.

A token is found by one uniform number in the cumulated probabilities, so each window has random numbers of its own
and nothing waits for the host. A text that ends is followed by a new one in the same window, and so is one that
repeats itself.

Shapes: B windows of C given and N new tokens, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nanoquant.decoder import evaluation_mode, input_device

LOOK_EVERY = 32
"""Steps between looks for repetition."""
LOOK_BACK = 96
"""Tokens that must repeat with one period, up to a third of them, to count as a loop."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float
    """Logits are divided by it."""
    ends: tuple[int, ...] = ()
    """Tokens that end a text."""
    begin: int | None = None
    """Token that must follow an end; None where texts follow each other without one."""
    first: int = 0
    """The first new token is drawn evenly from this many most probable ones; 0: as any other."""
    known: int | None = None
    """Only ids below this are drawn; None for all that the model has."""


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer in room for all of them: a longer text copies nothing.

    Args:
        room: tokens in all.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.count = room, 0
        self.store: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Put in (B, heads, new, d), and give all so far as views."""
        new = (key_states, value_states)
        if not self.store:
            self.lazy_initialization(*new)
            self.store = [x.new_empty(*x.shape[:-2], self.room, x.shape[-1]) for x in new]
        begun, self.count = self.count, self.count + key_states.shape[-2]
        for store, x in zip(self.store, new, strict=True):
            store[..., begun : self.count, :] = x
        self.keys, self.values = (store[..., : self.count, :] for store in self.store)
        return self.keys, self.values


def roomy_cache(model: nn.Module, room: int) -> DynamicCache:
    """A cache for ``room`` tokens; layers with a sliding window keep their own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


@torch.no_grad()
def sample(
    model: nn.Module,
    given: Tensor,
    chances: Tensor,
    how: Sampling,
    on_token: Callable[[int], Any] = lambda rows: None,
) -> Tensor:
    """Continue token ids by drawing from the model.

    Args:
        model: causal language model.
        given: token ids (B, C) to continue.
        chances: numbers in [0, 1) that decide the new tokens (B, N).
        how: temperature and what begins and ends a text.
        on_token: called with B after every step.

    Returns:
        New token ids (B, N), int64, on the CPU.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    device, count = input_device(model), chances.shape[1]
    given, chances = given.to(device), chances.to(device, torch.float32)
    ends = torch.tensor(how.ends, dtype=torch.long, device=device)
    starts = ends if how.begin is None else torch.tensor([how.begin], device=device)
    out = given.new_empty(len(given), count)
    cache = roomy_cache(model, given.shape[1] + count)
    finite = torch.ones(len(given), dtype=torch.bool, device=device)
    inputs, before = given, given[:, -1]
    with evaluation_mode(model):
        for step in range(count):
            done = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = done.logits[:, -1, : how.known].to(torch.float32, copy=True)  # (B, V)
            begins = torch.isin(before, starts)
            top = 0 if step else how.first
            token, fine = _draw(logits, chances[:, step], begins, ends, how, top)
            finite &= fine
            if step >= LOOK_BACK and step % LOOK_EVERY == 0 and how.ends:
                token = torch.where(loops(out[:, step - LOOK_BACK : step]), ends[0], token)
            if how.begin is not None:
                token = torch.where(torch.isin(before, ends), how.begin, token)
            out[:, step] = before = token
            inputs = token[:, None]
            on_token(len(given))
    if not finite.all():
        raise FloatingPointError("the model's logits are not finite, so it can't write text")
    return out.cpu()


def loops(tail: Tensor) -> Tensor:
    """Whether the last tokens (B, L) repeat with one period of at most L / 3: (B,)."""
    length = tail.shape[1]
    same = [(tail[:, p:] == tail[:, :-p]).all(1) for p in range(1, length // 3 + 1)]
    return torch.stack(same).any(0)


def _draw(
    logits: Tensor, chance: Tensor, begins: Tensor, ends: Tensor, how: Sampling, top: int
) -> tuple[Tensor, Tensor]:
    """One token a row of logits (B, V), which are overwritten, by numbers (B,), and whether the row was finite.

    No end comes where a text begins; with ``top`` above 0 the chance is even among that many.
    """
    if how.ends:
        logits[:, ends] = logits[:, ends].masked_fill(begins[:, None], float("-inf"))
    if top:
        found = logits.topk(min(top, logits.shape[1]), -1).indices
        logits = logits.fill_(float("-inf")).scatter_(1, found, 0.0)
    elif how.temperature != 1:
        logits.div_(how.temperature)
    sums = logits.sub_(logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    whole = sums[:, -1:]
    token = torch.searchsorted(sums, chance[:, None] * whole, right=True)[:, 0]
    return token.clamp_(max=logits.shape[1] - 1), whole[:, 0].isfinite()
