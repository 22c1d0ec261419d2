"""A model cut at the entrances of its decoder blocks, so that one block of it runs at a time.

The model's own forward does all that lies around its blocks, with the other blocks skipped: embedding, masks,
positions, final norm, head and what is done to logits are exactly what the model does, also where blocks are called
with tensors that depend on the text. What a block returns besides its hidden states never reaches the next one.

Shapes: B windows of a batch, T tokens a window, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nanoquant.decoder import Decoder, call_block, replaced_forwards, split_call


class _EnteredError(Exception):
    """Ends a forward pass at the entrance of a block, with its hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Segments:
    """Segment b goes from the entrance of block b to that of the next block; the last one ends with the logits.

    Args:
        model: a causal language model in evaluation mode.
        decoder: its blocks.
    """

    def __init__(self, model: nn.Module, decoder: Decoder) -> None:
        self.model, self.blocks = model, decoder.blocks
        self.returns: list[int | None] = [None] * len(self.blocks)
        """Length of the tuple that each block returns; None: the hidden states alone."""

    def enter(self, ids: Tensor) -> Tensor:
        """Hidden states (B, T, d) at the entrance of the first block, of token ids (B, T)."""
        return self._run(ids, {0: _stop})

    def __call__(self, index: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """Run one segment; those before it must have run once.

        Args:
            index: of the block.
            ids: token ids (B, T).
            hidden: at the entrance of the block (B, T, d).

        Returns:
            (B, T, d) at the entrance of the next block, or logits (B, T, vocabulary).
        """
        forwards: dict[int, Callable[..., Any]] = {k: self._skip(k) for k in range(index)}
        forwards[index] = self._replace(index, hidden)
        if index + 1 < len(self.blocks):
            forwards[index + 1] = _stop
        return self._run(ids, forwards)

    def _run(self, ids: Tensor, forwards: dict[int, Callable[..., Any]]) -> Tensor:
        """The model's forward with those of some blocks replaced: logits, or hidden states where it stops."""
        with replaced_forwards((self.blocks[k], forward) for k, forward in forwards.items()):
            try:
                return self.model(input_ids=ids, use_cache=False).logits
            except _EnteredError as entered:
                return entered.hidden

    def _skip(self, index: int) -> Callable[..., Any]:
        """A forward that gives back the hidden states, in the form in which the block returns them."""

        def skip(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            hidden, length = split_call(args, kwargs)[0], self.returns[index]
            return hidden if length is None else (hidden, *(None,) * (length - 1))

        return skip

    def _replace(self, index: int, hidden: Tensor) -> Callable[..., Any]:
        """The forward of a block on other hidden states than it is given."""
        forward = self.blocks[index].forward

        def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            given, call = split_call(args, kwargs)
            out = call_block(forward, hidden.to(given.device), call)
            self.returns[index] = len(out) if isinstance(out, tuple) else None
            return out

        return run


def _stop(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """A forward that ends the pass."""
    raise _EnteredError(split_call(args, kwargs)[0])
