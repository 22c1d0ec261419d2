"""The two activation streams of block reconstruction: behind the dense prefix and behind the quantized one.

Targets come from the dense block on the dense prefix, as in the published code; Algorithm 1 as printed feeds it the
quantized prefix instead, which leaves nothing for the first phase to repair. Shapes: N windows, T tokens, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoquant.activation_memory import ActivationMemory
from nanoquant.block_tuning import BlockData
from nanoquant.decoder import BlockCall, Decoder, capture_block_inputs, forgetting, run_block
from nanoquant.mapped import forget
from nanoquant.offload import at_work

BATCH = 4
"""Windows that run through a block at once."""


class Activations:
    """Inputs of the next block on the dense prefix and on the quantized one, (N, T, d) each.

    Each stream is written over as it moves past a block, so there are never more than two.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: Decoder,
        windows: Tensor,
        memory: ActivationMemory | None = None,
    ) -> None:
        self.memory = memory or ActivationMemory()
        with forgetting(model, decoder.blocks):
            self.dense, self.calls = capture_block_inputs(
                model, decoder, windows, empty=self.memory.empty
            )
        self.quantized = self.dense

    def targets_of(self, index: int, block: nn.Module) -> BlockData:
        """Run the still dense block on the dense prefix (the published code's target)."""
        fresh = self.dense
        if self.quantized is self.dense:
            fresh = self.memory.empty(self.dense.shape, self.dense)
        self.dense = run_windows(block, self.dense, self.calls[index], out=fresh)
        return BlockData(self.quantized, self.dense, self.calls[index])

    def advance(self, block: nn.Module, data: BlockData, name: str) -> None:
        """Move the quantized prefix past a finished block, which an error calls ``name``."""
        run_windows(block, self.quantized, data.call, out=self.quantized)
        for part in self.quantized.split(BATCH):
            if not part.isfinite().all():
                raise FloatingPointError(
                    f"{name} gives non-finite activations after reconstruction; lower its learning rates"
                )
            forget([part])


@torch.no_grad()
def run_windows(
    block: nn.Module, hidden: Tensor, call: BlockCall, batch: int = BATCH, out: Tensor | None = None
) -> Tensor:
    """Run a block over all windows (N, T, d), a few at a time; into ``out``, which may be the same tensor."""
    out = torch.empty_like(hidden) if out is None else out
    with at_work(block):
        device = next((p.device for p in block.parameters()), hidden.device)
        for given, own in zip(hidden.split(batch), out.split(batch), strict=True):
            own.copy_(run_block(block, given.to(device), call))
            forget([given, own])
    return out
