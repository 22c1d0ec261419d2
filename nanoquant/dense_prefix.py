"""DensePrefix: one dense forward pass, remembered, so that later passes may begin at any block.

Shapes: N windows, T tokens a window, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.decoder import (
    Decoder,
    evaluation_mode,
    forgetting,
    input_device,
    replaced_forwards,
)


class DensePrefix:
    """Outputs of every block and logits of the dense model on a few windows.

    Args:
        model: as it is now; its later states are compared with this one.
        decoder: its blocks.
        windows: token ids (N, T), all in one pass.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, windows: Tensor) -> None:
        self.model, self.decoder = model, decoder
        self.windows = windows.to(input_device(model))
        self.outputs: list[Any] = []  # of each block, as the block returns it
        handles = [
            block.register_forward_hook(lambda _, args, output: self.outputs.append(output))
            for block in decoder.blocks
        ]
        try:
            self.logits = self._run()  # (N, T, vocabulary)
        finally:
            for handle in handles:
                handle.remove()

    def logits_from(self, index: int) -> Tensor:
        """Logits (N, T, vocabulary) of the model as it is, whose blocks before ``index`` are still dense."""
        with skipped(self.decoder.blocks[:index], lambda: self.outputs[index - 1]):
            return self._run()

    @torch.no_grad()
    def _run(self) -> Tensor:
        with evaluation_mode(self.model), forgetting(self.model, self.decoder.blocks):
            return self.model(input_ids=self.windows, use_cache=False).logits


def skipped(
    blocks: Iterable[nn.Module], output: Callable[[], Any]
) -> contextlib.AbstractContextManager[None]:
    """While active, none of ``blocks`` runs: each returns ``output()`` instead."""
    return replaced_forwards((block, lambda *args, **kwargs: output()) for block in blocks)
