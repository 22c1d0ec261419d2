"""Quantized layers of a block as plain tensors; which process makes which block, and how all come to have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from nanoquant.architectures import Decoder, linear_shape
from nanoquant.block_config import BlockReport
from nanoquant.mapped import forget
from nanoquant.methods import Layer, kept_layer
from nanoquant.processes import broadcast, rank, world_size
from nanoquant.recorder import RecordBuffer, Recorder

Make = Callable[[int, Recorder], BlockReport]
"""Quantizes a block in place, by its number."""


def make_blocks(
    decoder: Decoder, turn: Sequence[int], together: bool, make: Make, recorder: Recorder
) -> dict[int, BlockReport]:
    """Quantize the blocks of a turn, the same on all processes.

    Args:
        decoder: blocks, which are dense in the same way on all processes.
        turn: numbers of the blocks, at most one a process; a single one where they work together.
        together: whether all processes make a block; else each makes one of its own.
        make: see :data:`Make`.
        recorder: takes the records, in the order of the blocks.
    """
    if world_size() == 1:
        return {b: make(b, recorder) for b in turn}
    dense = [parameter for b in turn for parameter in decoder.blocks[b].parameters()]
    buffer, found = RecordBuffer(broadcast(recorder.wanted)), {}
    if together or rank() < len(turn):
        own = turn[0 if together else rank()]
        result = (make(own, buffer), layer_parts(decoder, own), buffer)
    for owner, b in enumerate(turn):
        report, parts, records = broadcast(result if rank() == owner else None, owner)
        if rank() != owner:
            put_layers(decoder, b, parts)
        records.replay(recorder)
        found[b] = report
    forget(dense)
    return found


def layer_parts(decoder: Decoder, b: int) -> dict[str, dict[str, Tensor]]:
    """Parts of the quantized layers of a block, by full name."""
    return {
        decoder.full_name(b, name): dict(decoder.blocks[b].get_submodule(name).state_dict())
        for name in decoder.linears[b]
    }


def put_layers(decoder: Decoder, b: int, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Quantized layers of these parts, as of :func:`layer_parts`, in the place of the linears of a block."""
    for name in decoder.linears[b]:
        module, parts = decoder.blocks[b].get_submodule(name), layers[decoder.full_name(b, name)]
        if isinstance(module, Layer):  # this process has made it as well
            module.load_state_dict(parts)
        else:
            device = module.weight.device
            there = {part: tensor.to(device) for part, tensor in parts.items()}
            decoder.blocks[b].set_submodule(name, kept_layer(*linear_shape(module), there))
