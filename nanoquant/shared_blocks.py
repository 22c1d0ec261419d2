"""Binary layers of a block as plain tensors; which process makes which block, and how all of them come to have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from nanoquant.architectures import Decoder, linear_shape
from nanoquant.block_reconstruction import BlockReport
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.mapped import forget
from nanoquant.processes import broadcast, rank, world_size
from nanoquant.recorder import RecordBuffer, Recorder

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


def layer_parts(decoder: Decoder, b: int) -> dict[str, dict[str, Tensor]]:
    """Parts of the binary layers of a block, by full name."""
    return {
        decoder.full_name(b, name): dict(decoder.blocks[b].get_submodule(name).state_dict())
        for name in decoder.linears[b]
    }


def put_layers(decoder: Decoder, b: int, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Binary layers of these parts, as of :func:`layer_parts`, in the place of the linears of a block."""
    for name in decoder.linears[b]:
        module, parts = decoder.blocks[b].get_submodule(name), layers[decoder.full_name(b, name)]
        if isinstance(module, BinaryLowRankLinear):  # this process has made it as well
            module.load_state_dict(parts)
        else:
            decoder.blocks[b].set_submodule(name, _layer(module, parts))


def _layer(dense: nn.Module, parts: Mapping[str, Tensor]) -> BinaryLowRankLinear:
    """The binary layer of kept parts, without a copy, in the place of a dense linear or Conv1D."""
    d_out, d_in = linear_shape(dense)
    latent = "U" in parts
    rank = parts["U"].shape[1] if latent else len(parts["v_signs"])
    layer = BinaryLowRankLinear(d_in, d_out, rank, "bias" in parts, "meta")
    layer = layer if latent else layer.freeze()
    layer.load_state_dict({p: t.to(dense.weight.device) for p, t in parts.items()}, assign=True)
    return layer
