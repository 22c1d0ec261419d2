"""The choice of ranks: uniform, by a prior, or by measured sensitivity, always at the same bits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from nanoquant.admm import ADMMInitializer
from nanoquant.allocation import Response, allocate_by_loss, allocate_by_prior
from nanoquant.architectures import Decoder, linear_shape
from nanoquant.budget import allocate_ranks, body_bits, rank_limits
from nanoquant.config import NanoQuantConfig
from nanoquant.importance import Importance
from nanoquant.progress import Progress
from nanoquant.recorder import Recorder
from nanoquant.roles import layer_places
from nanoquant.sensitivity import SensitivityFile, SensitivityProbe, fingerprint, responses
from nanoquant.text import Text

logger = logging.getLogger(__name__)

LARGE_REMAINDER = 0.02
"""Share of the asked bits from which unspent ones are worth a warning."""


def decoder_shapes(decoder: Decoder, chosen: range) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear of the chosen blocks, by full name."""
    modules = decoder.linear_modules()
    names = [decoder.full_name(b, name) for b in chosen for name in decoder.linears[b]]
    return {name: linear_shape(modules[name]) for name in names}


def check_budget(decoder: Decoder, chosen: range, config: NanoQuantConfig) -> None:
    """Refuse bits that no ranks can meet, before any work.

    Raises:
        ValueError: says by how much.
    """
    rank_limits(decoder_shapes(decoder, chosen), config.budget)


def choose_ranks(
    model: nn.Module,
    decoder: Decoder,
    chosen: range,
    text: Text,
    importances: Mapping[str, Importance],
    config: NanoQuantConfig,
    progress: Progress,
    recorder: Recorder,
    file: str | Path | None = None,
) -> dict[str, int]:
    """Rank of every linear of the chosen blocks, by full name.

    Args:
        model: dense.
        decoder: its blocks.
        chosen: blocks to quantize.
        text: windows; measuring takes calibration ones.
        importances: of the linears, by full name.
        config: its budget says how.
        progress: told about measuring.
        recorder: takes the ranks and what they follow from.
        file: where measurements are kept, and from which an interrupted run resumes.

    Raises:
        ValueError: the bits can't be met; by how much.
    """
    shapes, places = decoder_shapes(decoder, chosen), layer_places(decoder, chosen)
    uniform, found = allocate_ranks(shapes, config.budget), {}
    if config.budget.allocation == "prior":
        ranks = allocate_by_prior(shapes, places, config.budget)
    elif config.budget.allocation == "measured":
        found = measure(model, decoder, chosen, text, importances, uniform, config, progress, file)
        ranks = allocate_by_loss(shapes, places, found, config.budget)
    else:
        ranks = uniform
    for b in chosen:
        for name in (decoder.full_name(b, linear) for linear in decoder.linears[b]):
            figures = _figures(found[name], uniform[name]) if name in found else {}
            recorder.record("ranks", block=b, layer=name, rank=ranks[name], **figures)
    _tell_remainder(config.budget.bits, body_bits(shapes, ranks), config.budget.rank_multiple)
    return ranks


def _figures(response: Response, uniform: int) -> dict[str, float]:
    """What is recorded of a measured linear: its loss in nats per token at the uniform rank."""
    loss = response.loss(uniform)
    return {"uniform_rank": uniform, "loss_at_uniform": loss, "exponent": response.exponent}


def _tell_remainder(asked: float, used: float, step: int) -> None:
    """Say how many bits the rank multiple leaves unspent."""
    short = asked - used
    level = logging.WARNING if short > LARGE_REMAINDER * asked else logging.INFO
    logger.log(
        level,
        "ranks in multiples of %d take %.4f bits per weight, %.4f below the asked %s",
        *(step, used, short, asked),
    )


def measure(
    model: nn.Module,
    decoder: Decoder,
    chosen: range,
    text: Text,
    importances: Mapping[str, Importance],
    uniform: Mapping[str, int],
    config: NanoQuantConfig,
    progress: Progress,
    file: str | Path | None,
) -> dict[str, Response]:
    """Loss over rank of every linear, measured group by group."""
    settings, step = config.sensitivity, config.budget.rank_multiple
    short = dataclasses.replace(config.admm, iterations=settings.iterations)
    stages = (settings, short, config.importance, config.calibration)
    decisive = {type(stage).__name__: dataclasses.asdict(stage) for stage in stages}
    decisive |= {"ranks": dict(uniform), "step": step, "seed": config.run.seed}
    calibration = text.calibration[: max(config.calibration.windows, settings.windows)]
    known = SensitivityFile(file, fingerprint(model, calibration, decisive))
    todo = {
        decoder.full_name(b, names[0]): (b, names) for b in chosen for names in decoder.groups[b]
    }
    todo = {key: group for key, group in todo.items() if key not in known.groups}
    with progress.phase("ranks", len(todo)):
        if todo:
            windows = text.calibration[: settings.windows, : settings.length]
            probe = SensitivityProbe(
                model,
                decoder,
                importances,
                uniform,
                step,
                config.budget.bits,
                windows,
                settings.spread,
                ADMMInitializer(short),
                config.run.seed,
            )
        for key, (b, names) in todo.items():
            group = probe.measure(b, names)
            known.add(key, group)
            progress.advance(1, note=f"block {b}: divergence {group.divergence:.4f}")
    return responses(known.groups, uniform)
