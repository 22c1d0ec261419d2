"""What transformers' ``generate`` tells while it works: text as it comes, and when each step was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.generation.streamers import BaseStreamer, TextStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Write = Callable[[int, str, bool], None]
"""Called with the number of a prompt, new text of it, and whether that was the last."""


class BatchStreamer(BaseStreamer):
    """Follows one call of ``generate``; the text of a row comes in whole words.

    Args:
        tokenizer: decodes the tokens; special ones are left out.
        rows: sequences of the batch.
        stops: ids that end a row; what comes after is padding.
        write: receives the text; None only takes the times.
        first: number of the first row's prompt, for ``write``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        stops: Collection[int],
        write: Write | None = None,
        first: int = 0,
    ) -> None:
        self.times: list[float] = []
        self.stops = stops
        self.texts: dict[int, _RowText] = {}
        if write is not None:
            self.texts = {row: _RowText(tokenizer, write, first + row) for row in range(rows)}

    def put(self, value: Tensor) -> None:
        """Take the prompts first, then one token a row, on the CPU: the device has computed it."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        for row, text in list(self.texts.items()):
            text.put(value[row : row + 1])
            if int(value[row]) in self.stops:
                self.texts.pop(row).end()

    def end(self) -> None:
        """Write what rows without an end token still hold."""
        for text in self.texts.values():
            text.end()

    @property
    def prefill_seconds(self) -> float:
        """From the prompts to the first new token, caches and masks included."""
        return self.times[1] - self.times[0]

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of every step after that."""
        return [late - early for early, late in zip(self.times[1:-1], self.times[2:], strict=True)]


class _RowText(TextStreamer):
    """Gives the words of one row to ``write`` instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write, number: int) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write, self.number = write, number

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass new text on."""
        if text or stream_end:
            self.write(self.number, text, stream_end)
