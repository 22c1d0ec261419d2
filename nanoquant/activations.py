"""The two activation streams of block reconstruction: behind the dense prefix and behind the quantized one.

Targets come from the dense block on the dense prefix, as in the published code; Algorithm 1 as printed feeds it the
quantized prefix instead, which leaves nothing for the first phase to repair. Shapes: N windows, T tokens, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoquant.block_tuning import BlockData
from nanoquant.decoder import BlockCall, Decoder, capture_block_inputs, run_block


class Activations:
    """Inputs of the next block on the dense prefix and on the quantized one, (N, T, d) each."""

    def __init__(self, model: PreTrainedModel, decoder: Decoder, windows: Tensor) -> None:
        self.dense, self.calls = capture_block_inputs(model, decoder, windows)
        self.quantized = self.dense

    def targets_of(self, index: int, block: nn.Module) -> BlockData:
        """Run the still dense block on the dense prefix (the published code's target)."""
        self.dense = run_windows(block, self.dense, self.calls[index])
        return BlockData(self.quantized, self.dense, self.calls[index])

    def advance(self, block: nn.Module, data: BlockData, name: str) -> None:
        """Move the quantized prefix past a finished block, which an error calls ``name``."""
        self.quantized = run_windows(block, self.quantized, data.call)
        if not self.quantized.isfinite().all():
            raise FloatingPointError(
                f"{name} gives non-finite activations after reconstruction; lower its learning rates"
            )


@torch.no_grad()
def run_windows(block: nn.Module, hidden: Tensor, call: BlockCall, batch: int = 4) -> Tensor:
    """Run a block over all windows (N, T, d), a few at a time."""
    return torch.cat(
        [run_block(block, part, call).to(hidden.dtype) for part in hidden.split(batch)]
    )
