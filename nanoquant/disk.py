"""Room on the disk: what a run leaves there at most, against what is free, before anything is computed.

Shapes: a linear is (d_out, d_in).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from nanoquant.architectures import find_decoder
from nanoquant.budget import allocate_ranks, layer_bits
from nanoquant.config import NanoQuantConfig
from nanoquant.kept_logits import bytes_a_token
from nanoquant.output_folder import check_writable
from nanoquant.ranks import check_budget, decoder_shapes
from nanoquant.sizes import tensor_bytes
from nanoquant.unfinished import PATTERN
from nanoquant.units import amount

KEPT_BYTES = 4
"""Bytes of a latent, or a scale, in the file of its block; frozen signs are packed."""
STATE_BYTES = 16
"""Bytes that the whole-model phase keeps of each: itself, two moments, the best state."""
HEADERS = 4096
"""Bytes a linear that names and shapes take in those files, and what is recorded of it."""


@dataclass(frozen=True)
class Room:
    """Most bytes of what a run writes."""

    checkpoint: int
    unfinished: int


def room_of(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    config: NanoQuantConfig,
    inputs: Sequence[int] | None = None,
) -> Room:
    """Bytes of a run.

    Args:
        model: dense; may be on the meta device.
        shapes: of the linears that are quantized, by full name.
        ranks: of the same, as the bits give them.
        config: of the run.
        inputs: d_in of every tensor that linears read; None where it is not known which of them read the same one.
    """
    inputs = [d_in for _, d_in in shapes.values()] if inputs is None else inputs
    dense = sum(d_out * d_in for d_out, d_in in shapes.values())
    kept = tensor_bytes(model.parameters()) - model.dtype.itemsize * dense
    packed = sum(layer_bits(*shapes[name], rank) for name, rank in ranks.items()) // 8
    if config.run.save_every is None:
        return Room(kept + packed, 0)
    scales = sum(d_out + d_in for d_out, d_in in shapes.values())
    latents = sum((d_out + d_in) * ranks[name] for name, (d_out, d_in) in shapes.items())
    each = KEPT_BYTES
    if config.model.train != "none" and config.model.optimizer.state_bits == 32:
        each += 2 * STATE_BYTES  # the old one is there until the new one is whole
    signs = each * latents if config.model.train == "signs" else packed
    other = _statistics_bytes(shapes, inputs, config.importance.curvature)
    if (k := config.model.kept_logits) is not None and config.model.train != "none":
        windows = config.model.windows + config.model.held_out
        other += bytes_a_token(k) * windows * config.calibration.length
    return Room(kept + packed, signs + each * scales + HEADERS * len(shapes) + other)


def _statistics_bytes(
    shapes: Mapping[str, tuple[int, int]], inputs: Sequence[int], curvature: str
) -> int:
    """Most bytes of the importances: correlations of inputs and of outputs, and each channel's own."""
    pairs = sum(d_in**2 for d_in in inputs) * (curvature != "diagonal")
    pairs += sum(d_out**2 for d_out, _ in shapes.values()) * (curvature == "both")
    return 4 * (pairs + sum(d_out + d_in for d_out, d_in in shapes.values()))


def check_room(output: str | Path, room: Room, work: str | Path | None = None) -> str:
    """What is needed and what is free, as text.

    Args:
        output: where the checkpoint is to go, its unfinished work beside it.
        room: of the run.
        work: folder of unfinished work that an earlier try has left, which needs no room any more.

    Raises:
        ValueError: too little is free, or nothing can be written there.
    """
    place = Path(output).absolute()
    while not place.exists():
        place = place.parent
    place = place if place.is_dir() else place.parent
    check_writable(place, "the checkpoint")
    there = sum(file.stat().st_size for file in Path(work).glob(PATTERN)) if work else 0
    needed, free = room.checkpoint + max(0, room.unfinished - there), shutil.disk_usage(place).free
    text = (
        f"{amount(room.checkpoint)} checkpoint and up to {amount(room.unfinished)} of unfinished work, "
        + (f"{amount(there)} of it there, " if there else "")
        + f"{amount(free)} free in {place}"
    )
    if needed > free:
        keep = ", or keep none of the work: --run.save_every null" if room.unfinished else ""
        raise ValueError(
            f"{text}: {amount(needed - free)} too little; make room or take another output{keep}"
        )
    return text


def check_run(
    output: str | Path, work: str | Path, model: PreTrainedModel, config: NanoQuantConfig
) -> str:
    """What :func:`check_room` says of a run; arguments as there.

    Raises:
        ValueError: as there, or no ranks meet the budget.
    """
    decoder = find_decoder(model)
    chosen = config.block_range(len(decoder.blocks))
    option = check_budget(model, decoder, chosen, config)[0]
    shapes = decoder_shapes(decoder, chosen)
    groups = [(b, group[0]) for b in chosen for group in decoder.groups[b]]
    inputs = [shapes[decoder.full_name(b, name)][1] for b, name in groups]
    room = room_of(model, shapes, allocate_ranks(shapes, option.budget), option, inputs)
    return check_room(output, room, work)
