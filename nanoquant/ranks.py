"""The choice of sizes: ranks uniform, by a prior, or by measured sensitivity, or codebooks; always at the same bits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.allocation import Response, allocate_by_loss, allocate_by_prior
from nanoquant.architectures import Decoder, linear_shape
from nanoquant.config import NanoQuantConfig
from nanoquant.embedding import EmbeddingConfig
from nanoquant.file_budget import embedding_divergence, file_options
from nanoquant.importance import Importance
from nanoquant.methods import Initializer, Sizes, body_bits, entry_of, method_of
from nanoquant.processes import divided, world_size
from nanoquant.progress import Progress
from nanoquant.recorder import Recorder
from nanoquant.roles import layer_places
from nanoquant.sensitivity import (
    GroupLoss,
    SensitivityFile,
    SensitivityProbe,
    fingerprint,
    responses,
)
from nanoquant.text import Text

logger = logging.getLogger(__name__)

LARGE_REMAINDER = 0.02
"""Share of the asked bits from which unspent ones are worth a warning."""


def decoder_shapes(decoder: Decoder, chosen: range) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear of the chosen blocks, by full name."""
    modules = decoder.linear_modules()
    names = [decoder.full_name(b, name) for b in chosen for name in decoder.linears[b]]
    return {name: linear_shape(modules[name]) for name in names}


def check_budget(
    model: PreTrainedModel, decoder: Decoder, chosen: range, config: NanoQuantConfig
) -> list[NanoQuantConfig]:
    """Refuse a budget that no sizes can meet, before any work; see :func:`file_options`."""
    return file_options(model, decoder, chosen, decoder_shapes(decoder, chosen), config)


@dataclass(frozen=True)
class Choice:
    """Sizes by full name, and the config that they meet: its bits, and those of its embedding, are numbers."""

    sizes: Sizes
    config: NanoQuantConfig


def choose_sizes(
    model: PreTrainedModel,
    decoder: Decoder,
    chosen: range,
    text: Text,
    importances: Callable[[int], Mapping[str, Importance]],
    options: list[NanoQuantConfig],
    progress: Progress,
    recorder: Recorder,
    file: str | Path | None = None,
    initializer: Initializer | None = None,
) -> Choice:
    """Size of every linear of the chosen blocks.

    Args:
        model: dense.
        decoder: its blocks.
        chosen: blocks to quantize.
        text: windows; measuring takes calibration ones.
        importances: gives those of a block's linears, by full name; asked for where they are needed.
        options: configs of :func:`check_budget`, which differ in bits alone.
        progress: told about measuring.
        recorder: takes the sizes and what they follow from.
        file: where measurements are kept, and from which an interrupted run resumes.
        initializer: measured in the place of a short ADMM; without a file, as that can't tell which one it was.

    Raises:
        ValueError: the bits can't be met; by how much.
    """
    shapes, places = decoder_shapes(decoder, chosen), layer_places(decoder, chosen)
    config = options[len(options) // 2]
    method, found = method_of(config), {}
    uniform = method.plan(shapes, config)
    if config.budget.allocation == "prior":
        sizes = allocate_by_prior(shapes, places, config.budget)
    elif config.budget.allocation == "measured":
        measure = Measurement(model, decoder, importances, uniform, config, file, initializer)
        found, embedding = measure(chosen, text, [o.embedding for o in options], progress)
        by_loss = [allocate_by_loss(shapes, places, found, o.budget) for o in options]
        left = [config.sensitivity.remains * total_loss(found, ranks) for ranks in by_loss]
        best = min(range(len(options)), key=lambda k: left[k] + embedding[k])
        config, sizes = options[best], by_loss[best]
        if len(options) > 1:
            _tell_options(options, embedding, left)
    else:
        sizes = uniform
    for b in chosen:
        for name in (decoder.full_name(b, linear) for linear in decoder.linears[b]):
            figures = _figures(found[name], uniform[name]) if name in found else {}
            recorder.record("ranks", block=b, layer=name, **entry_of(sizes[name]), **figures)
    _tell_remainder(config.budget.bits, body_bits(shapes, sizes), method.steps(config))
    return Choice(sizes, config)


def total_loss(found: Mapping[str, Response], ranks: Mapping[str, int]) -> float:
    """Sum of all linears' losses at these ranks, nats per token, as if none were reconstructed."""
    return sum(found[name].loss(rank) for name, rank in ranks.items())


def _tell_options(
    options: list[NanoQuantConfig], embedding: list[float], left: list[float]
) -> None:
    """Say what each storage of the embedding is expected to cost."""
    for option, table, body in zip(options, embedding, left, strict=True):
        logger.info(
            "embedding at %d bits, linears at %.4f: expected divergence %.4f + %.4f",
            *(option.embedding.bits, option.budget.bits, table, body),
        )


def _figures(response: Response, uniform: int) -> dict[str, float]:
    """What is recorded of a measured linear: its loss in nats per token at the uniform rank."""
    loss = response.loss(uniform)
    return {"uniform_rank": uniform, "loss_at_uniform": loss, "exponent": response.exponent}


def _tell_remainder(asked: float, used: float, steps: str) -> None:
    """Say how many bits the steps of sizes leave unspent."""
    short = asked - used
    level = logging.WARNING if short > LARGE_REMAINDER * asked else logging.INFO
    logger.log(
        level,
        "%s take %.4f bits per weight, %.4f below the asked %.6g",
        *(steps, used, short, asked),
    )


@dataclass(frozen=True)
class Measurement:
    """Measures what ranks and embedding cost; see :func:`choose_sizes` for the fields."""

    model: PreTrainedModel
    decoder: Decoder
    importances: Callable[[int], Mapping[str, Importance]]
    uniform: Mapping[str, int]
    config: NanoQuantConfig
    file: str | Path | None
    initializer: Initializer | None

    def __call__(
        self,
        chosen: range,
        text: Text,
        embeddings: list[EmbeddingConfig],
        progress: Progress,
    ) -> tuple[dict[str, Response], list[float]]:
        """Loss over rank of every linear, and the divergence that each storage of the embedding costs.

        A single storage is not measured: there is nothing to choose.
        """
        settings, decoder = self.config.sensitivity, self.decoder
        short = dataclasses.replace(self.config.admm, iterations=settings.iterations)
        known = self._known(text, short)
        groups = {
            decoder.full_name(b, names[0]): (b, names)
            for b in chosen
            for names in decoder.groups[b]
        }
        groups = {key: group for key, group in groups.items() if key not in known.groups}
        tables = {
            f"embedding {e.bits} {e.group_size}": e for e in embeddings if len(embeddings) > 1
        }
        new = {key: table for key, table in tables.items() if key not in known.groups}
        with progress.phase("ranks", len(groups) + len(new)):
            if groups or new:
                probe = self._probe(text.calibration[: self._windows(), : settings.length], short)
            for key, table in new.items():
                known.add(key, GroupLoss(embedding_divergence(self.model, probe.dense, table), {}))
                progress.advance(
                    1, note=f"embedding: divergence {known.groups[key].divergence:.4f}"
                )
            held: dict[int, Mapping[str, Importance]] = {}

            def measure(group: tuple[int, tuple[str, ...]]) -> GroupLoss:
                b, names = group
                if b not in held:
                    held.clear()  # those of the block before are let go of first
                    held[b] = self.importances(b)
                return probe.measure(b, names, held[b])

            for begin in range(0, len(groups), world_size()):
                turn = list(groups.items())[begin : begin + world_size()]
                losses = divided(measure, [group for _, group in turn])
                for (key, (b, _)), loss in zip(turn, losses, strict=True):
                    known.add(key, loss)
                    progress.advance(1, note=f"block {b}: divergence {loss.divergence:.4f}")
        costs = [known.groups[key].divergence for key in tables] or [0.0]
        return responses(known.groups, self.uniform), costs

    def _windows(self) -> int:
        """How many windows losses are measured on."""
        return min(self.config.sensitivity.windows, self.config.calibration.windows)

    def _known(self, text: Text, short: ADMMConfig) -> SensitivityFile:
        """What the file has already."""
        config = self.config
        stages = (config.sensitivity, short, config.importance, config.calibration)
        decisive = {type(stage).__name__: dataclasses.asdict(stage) for stage in stages}
        del decisive["SensitivityConfig"]["remains"]  # it weighs what was measured
        decisive["SensitivityConfig"]["windows"] = self._windows()
        decisive |= {"ranks": dict(self.uniform), "step": config.budget.rank_multiple}
        decisive["seed"] = config.run.seed
        if config.sensitivity.spread:  # the highest rank that is measured depends on them
            decisive["bits"] = config.budget.limiting_bits
        calibration = text.calibration[: config.calibration.windows]
        return SensitivityFile(self.file, fingerprint(self.model, calibration, decisive))

    def _probe(self, windows: Tensor, short: ADMMConfig) -> SensitivityProbe:
        """Measures groups on windows (N, T)."""
        return SensitivityProbe(
            self.model,
            self.decoder,
            self.uniform,
            self.config.budget.rank_multiple,
            self.config.budget.limiting_bits,
            windows,
            self.config.sensitivity.spread,
            self.initializer or ADMMInitializer(short),
            self.config.run.seed,
        )
