"""The estimate of a run: sizes, memory, disk and time, from shapes and a configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from nanoquant.advice.anatomy import anatomy
from nanoquant.advice.config import AdviceConfig
from nanoquant.advice.memory import activation_bytes, cache_bytes
from nanoquant.advice.options import Option
from nanoquant.config import NanoQuantConfig
from nanoquant.disk import Room, room_of
from nanoquant.estimate.limits import quantities
from nanoquant.estimate.machine import ASSUMED, FASTEST, SLOWEST, STARTING, Rates, measure
from nanoquant.estimate.memory import needs
from nanoquant.estimate.operations import phases, visits
from nanoquant.estimate.quantities import Quantities
from nanoquant.estimate.request import HERE, EstimateConfig
from nanoquant.estimate.size import Size, size_of
from nanoquant.estimate.subject import Subject
from nanoquant.estimate.terms import Need, Use
from nanoquant.file_budget import file_options

logger = logging.getLogger(__name__)

SHARED = ("ranks", "blocks", "model")
"""Phases that several devices divide."""


@dataclass(frozen=True)
class Inference:
    """Memory of the quantized model while it runs."""

    context: int
    """Tokens of prompt and answer."""
    batch: int
    """Texts at once."""
    weights: int
    """Bytes of parameters and buffers; exact where ranks are."""
    cache: int
    """Bytes of keys and values at full context."""
    activations: int
    """Bytes of a pass over the whole context at once; an estimate."""
    base: int
    """Bytes of the process with its libraries, in main memory."""


@dataclass(frozen=True)
class Estimate:
    """All that is known beforehand."""

    subject: Subject
    quantities: Quantities
    sizes: list[Size]
    """One, or one for each storage of the embedding that a budget for the file leaves."""
    needs: list[Need]
    disk: Room
    inference: Inference | None
    """None where the cache of the model is not one of keys and values."""
    seconds: dict[str, tuple[float, float]]
    """Fewest and most seconds of each phase that takes long."""
    rates: Rates
    devices: int


def make_estimate(
    subject: Subject,
    config: NanoQuantConfig,
    request: EstimateConfig,
    base: int,
    device: torch.device,
) -> Estimate:
    """Estimate a run.

    Args:
        subject: the model.
        config: of the run.
        request: how it is measured, where it runs, how its result is used.
        base: bytes of a process with all libraries.
        device: where it runs if that is here.

    Raises:
        ValueError: the bits can't be met, or the context goes beyond the model's positions.
    """
    gpu = request.machine != HERE or device.type == "cuda"
    length = request.eval_length if request.eval_windows else None
    use = Use(base, gpu, length, devices=request.devices, text=request.text or ())
    options = file_options(subject.model, subject.decoder, subject.chosen, subject.shapes, config)
    q = quantities(subject, config, use)
    rates = ASSUMED.get(request.machine) or measure(q, device)
    sizes = [size_of(subject, option) for option in options]
    found = Estimate(
        subject,
        q,
        sizes,
        needs(q),
        disk(q, sizes[len(sizes) // 2]),
        inference(subject, sizes[len(sizes) // 2], request, base, "cuda" if gpu else "cpu"),
        seconds(q, rates, request),
        rates,
        request.devices,
    )
    return found


def disk(q: Quantities, size: Size) -> Room:
    """What a run leaves on the disk at most, while it runs and afterwards."""
    subject = q.subject
    room = room_of(subject.model, subject.decoder, subject.chosen, q.given, q.config)
    return replace(room, checkpoint=size.most)


def inference(
    subject: Subject, size: Size, request: EstimateConfig, base: int, device: str
) -> Inference | None:
    """Memory of the quantized model at a context and batch."""
    asked = AdviceConfig(context=request.context, batch=request.batch, device=device)
    positions = getattr(subject.text_config, "max_position_embeddings", None)
    use = asked.use(positions, subject.name)
    try:
        model = anatomy(subject.text_config)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    option = Option("own", "nanoquant", size.config.budget.bits, "nanoquant")
    layers = [(subject.shapes[name], own) for name, own in size.given.items()]
    return Inference(
        use.context,
        use.batch,
        size.files.sizes.bytes_resident + size.most - size.files.weight_bytes,
        cache_bytes(model, use),
        activation_bytes(model, option, use, layers=layers),
        base,
    )


def seconds(q: Quantities, rates: Rates, request: EstimateConfig) -> dict[str, tuple[float, float]]:
    """Fewest and most seconds of each phase."""
    found, passes = {}, visits(q, request.eval_windows)
    for name, work in phases(q, request.eval_windows).items():
        own = rates.seconds(work) / (request.devices if name in SHARED else 1)
        own *= rates.initializer if name in ("ranks", "blocks") else 1.0
        if q.visits and name in passes:
            own += passes[name] * (q.subject.dense_bytes - q.around) / rates.moved
        extra = STARTING if name == "measure in a fresh process" else 0.0
        found[name] = FASTEST * own, SLOWEST * own + extra
    return found
