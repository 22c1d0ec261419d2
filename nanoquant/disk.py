"""Room on the disk: what a run leaves there at most, against what is free, before anything is computed.

Shapes: a linear is (d_out, d_in).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

from transformers import PreTrainedModel

from nanoquant.activation_memory import SETTING
from nanoquant.architectures import Decoder, find_decoder
from nanoquant.budget import Shapes
from nanoquant.config import NanoQuantConfig
from nanoquant.importance_store import statistics_bytes
from nanoquant.kept_logits import bytes_a_token
from nanoquant.methods import Size, method_of, stored_bits, trained_numbers
from nanoquant.output_folder import check_writable
from nanoquant.ranks import check_budget, decoder_shapes
from nanoquant.sizes import tensor_bytes
from nanoquant.unfinished import PATTERN
from nanoquant.units import amount, parse_bytes

KEPT_BYTES = 4
"""Bytes of a latent, an entry or a scale in the file of its block; frozen signs and indices are packed."""
STATE_BYTES = 16
"""Bytes that the whole-model phase keeps of each: itself, two moments, the best state."""
HEADERS = 4096
"""Bytes a linear that names and shapes take in those files, and what is recorded of it."""


@dataclass(frozen=True)
class Room:
    """Most bytes of what a run writes."""

    checkpoint: int
    """Weight files of the checkpoint."""
    unfinished: int
    """Work that a killed run goes on with."""
    activations: int = 0
    """Activations beyond ``run.activation_memory``, in files without a name."""


@dataclass(frozen=True)
class Streams:
    """Activations of all windows that a phase keeps between blocks, in tensors of one size."""

    tensors: int
    each: int
    """Bytes."""

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.tensors * self.each

    def beyond(self, limit: str | None) -> int:
        """Bytes on the disk of those that a limit for memory leaves no room: whole tensors, in whole pages."""
        if limit is None:
            return 0
        kept = min(self.tensors, parse_bytes(limit) // self.each)
        return (self.tensors - kept) * -(-self.each // PAGESIZE) * PAGESIZE


def streams(
    model: PreTrainedModel, blocks: int, chosen: range, config: NanoQuantConfig
) -> tuple[Streams, Streams, Streams]:
    """Inputs of blocks from the first chosen one, and a gradient; outputs of dense and binary prefix; teacher's states.

    Args:
        model: dense; may be on the meta device.
        blocks: of the model.
        chosen: those that are quantized.
        config: of the run.

    Returns:
        What calibration keeps, what is kept while blocks are tuned, and what of the teacher while the model trains; of
        no tensor where nothing is.
    """
    width = model.config.get_text_config().hidden_size * model.dtype.itemsize
    window, settings = config.calibration.length * width, config.model
    asked = settings.windows + config.self_text.windows + settings.held_out
    return (
        Streams(blocks - chosen.start + 1, config.calibration.windows * window),
        Streams(2 * config.block.tunes, config.block.windows * window),
        Streams(int(settings.recalls), asked * window),
    )


def room_of(
    model: PreTrainedModel,
    decoder: Decoder,
    chosen: range,
    sizes: Mapping[str, Size],
    config: NanoQuantConfig,
) -> Room:
    """Bytes of a run.

    Args:
        model: dense; may be on the meta device.
        decoder: its blocks.
        chosen: those that are quantized.
        sizes: of their linears by full name, as the bits give them.
        config: of the run.
    """
    shapes = decoder_shapes(decoder, chosen)
    dense = sum(d_out * d_in for d_out, d_in in shapes.values())
    kept = tensor_bytes(model.parameters()) - model.dtype.itemsize * dense
    packed = sum(stored_bits(shapes[name], size) for name, size in sizes.items()) // 8
    calibration, *others = streams(model, len(decoder.blocks), chosen, config)
    beyond = max(s.beyond(config.run.activation_memory) for s in (calibration, *others))
    if config.run.save_every is None:
        return Room(kept + packed, 0, beyond)
    groups = [decoder.full_name(b, group[0]) for b in chosen for group in decoder.groups[b]]
    inputs = [shapes[name][1] for name in groups]
    work = statistics_bytes(list(shapes.values()), inputs, config.importance.curvature)
    work += max(2 * calibration.each, _trained_bytes(shapes, sizes, packed, config))
    return Room(kept + packed, work + HEADERS * len(shapes), beyond)


def _trained_bytes(
    shapes: Shapes, sizes: Mapping[str, Size], packed: int, config: NanoQuantConfig
) -> int:
    """Layers, the whole-model phase, and what it keeps of the teacher; calibration's gradient is gone then."""
    settings, each = config.model, KEPT_BYTES
    numbers, signs = trained_numbers(shapes, sizes), settings.train == "signs"
    if settings.train != "none" and settings.optimizer.state_bits == 32:
        each += 2 * STATE_BYTES  # the old one is there until the new one is whole
    found = each * numbers.latents if signs and numbers.latents else packed
    found += (each if signs else KEPT_BYTES) * numbers.entries + each * numbers.scales
    if (k := settings.kept_logits) is not None:
        windows = settings.windows + settings.held_out
        found += bytes_a_token(k) * windows * config.calibration.length
    return found


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
    needed = room.checkpoint + max(0, room.unfinished - there) + room.activations
    free = shutil.disk_usage(place).free
    text = (
        f"{amount(room.checkpoint)} checkpoint and up to {amount(room.unfinished)} of unfinished work, "
        + (f"{amount(there)} of it there, " if there else "")
        + (f"{amount(room.activations)} of activations, " if room.activations else "")
        + f"{amount(free)} free in {place}"
    )
    if needed > free:
        keep = ", or keep none of the work: --run.save_every null" if room.unfinished else ""
        keep += f", or raise {SETTING}" if room.activations else ""
        raise ValueError(
            f"{text}: {amount(needed - free)} too little; make room or take another output{keep}"
        )
    return text


def check_run(
    output: str | Path, work: str | Path, model: PreTrainedModel, config: NanoQuantConfig
) -> str:
    """What :func:`check_room` says of a run; arguments as there.

    Raises:
        ValueError: as there, or nothing meets the budget.
    """
    decoder = find_decoder(model)
    chosen = config.block_range(len(decoder.blocks))
    option = check_budget(model, decoder, chosen, config)[0]
    sizes = method_of(option).plan(decoder_shapes(decoder, chosen), option)
    return check_room(output, room_of(model, decoder, chosen, sizes, option), work)
