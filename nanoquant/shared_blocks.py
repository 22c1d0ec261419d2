"""Which process makes which block binary, and how all of them come to have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanoquant.architectures import Decoder
from nanoquant.block_reconstruction import BlockReport
from nanoquant.mapped import forget
from nanoquant.processes import broadcast, rank, world_size
from nanoquant.recorder import RecordBuffer, Recorder
from nanoquant.unfinished import layer_parts, put_layers

Make = Callable[[int, Recorder], BlockReport]
"""Makes a block binary in place, by its number."""


def make_blocks(
    decoder: Decoder, turn: Sequence[int], together: bool, make: Make, recorder: Recorder
) -> dict[int, BlockReport]:
    """Make the blocks of a turn binary, the same on all processes.

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
