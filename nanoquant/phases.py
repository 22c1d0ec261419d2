"""The phases of the method, each on the whole model: calibration, sizes and blocks, the model itself."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from nanoquant.activation_memory import ActivationMemory
from nanoquant.activations import Activations
from nanoquant.architectures import Decoder
from nanoquant.block_config import BlockReport
from nanoquant.block_reconstruction import BlockReconstructor
from nanoquant.block_tuning import BlockData
from nanoquant.calibration import BlockwiseCalibration, passes
from nanoquant.config import NanoQuantConfig
from nanoquant.decoder import capture_block_inputs, forgetting
from nanoquant.heap import give_back
from nanoquant.importance import Importance
from nanoquant.known_windows import known_windows
from nanoquant.mapped import forget, paged
from nanoquant.methods import Initializer, Sizes
from nanoquant.model_reconstruction import ModelReconstructor, ModelReport
from nanoquant.offload import at_work
from nanoquant.processes import gather, world_size
from nanoquant.progress import Progress
from nanoquant.ranks import choose_sizes
from nanoquant.recorder import BlockRecorder, Recorder
from nanoquant.shared_blocks import make_blocks
from nanoquant.text import Text
from nanoquant.unfinished import Initialized, Unfinished

logger = logging.getLogger(__name__)


def precision_of(model: PreTrainedModel, config: NanoQuantConfig) -> str:
    """Lightning precision: the config's, or mixed for a bfloat16 model and full for float32."""
    usual = "bf16-mixed" if model.dtype == torch.bfloat16 else "32-true"
    return config.run.precision or usual


def initialize(
    model: PreTrainedModel,
    decoder: Decoder,
    chosen: range,
    text: Text,
    options: list[NanoQuantConfig],
    reconstructor: BlockReconstructor,
    progress: Progress,
    loggers: list[Any] | None,
    recorder: Recorder,
    unfinished: Unfinished,
    memory: ActivationMemory,
    sensitivity_file: str | Path | None,
    initializer: Initializer | None = None,
) -> Initialized:
    """All that comes before the whole-model phase: importances, sizes, quantized blocks.

    Raises:
        ValueError: blocks are to run one by one, and what they are called with depends on the text.
    """
    importances = unfinished.importances
    if options[0].block.tunes or options[0].model.kept_logits is not None:
        check_calls(model, decoder)
    calibrate(model, decoder, chosen, text, options[0], progress, unfinished, memory)
    choice = choose_sizes(
        model,
        decoder,
        chosen,
        text,
        importances,
        options,
        progress,
        recorder,
        sensitivity_file,
        initializer,
    )
    option = options.index(choice.config)
    reports = reconstruct_blocks(
        model,
        decoder,
        chosen,
        reconstructor,
        importances,
        choice.sizes,
        text,
        choice.config,
        progress,
        loggers,
        recorder,
        unfinished,
        option,
        memory,
    )
    diagonals = importances.diagonals(chosen)
    importances.release()
    return Initialized(option, choice.sizes, reports, diagonals)


def check_calls(model: PreTrainedModel, decoder: Decoder) -> None:
    """Refuse a model whose blocks can't run on their own, by two short texts, before any long step.

    Raises:
        ValueError: what a block is called with depends on the text.
    """
    tokens = torch.arange(4) % model.get_input_embeddings().num_embeddings
    with forgetting(model, decoder.blocks):
        capture_block_inputs(model, decoder, torch.stack([tokens, tokens.flip(0)]))


def calibrate(
    model: PreTrainedModel,
    decoder: Decoder,
    chosen: range,
    text: Text,
    config: NanoQuantConfig,
    progress: Progress,
    unfinished: Unfinished,
    memory: ActivationMemory,
) -> None:
    """Phase 1: importances of the linears of the chosen blocks, kept as they come, but those that are kept already."""
    blocks = len(decoder.blocks)
    done, gradient = unfinished.calibrated(blocks, chosen)
    gather(None)  # all processes have read before the first one writes
    if done == chosen.start:
        return
    calibration = BlockwiseCalibration(
        model,
        decoder,
        text.calibration[: config.calibration.windows],
        config.importance,
        config.calibration.batch,
        memory,
    )

    def keep(b: int, importances: Mapping[str, Importance]) -> None:
        unfinished.keep_calibrated(b, chosen, importances, calibration.gradient)

    with progress.phase("calibrate", passes(done, chosen.start)):
        calibration(chosen, keep, progress.advance, done, gradient)
    gather(None)  # the first one has written what all read from now on


def reconstruct_blocks(
    model: PreTrainedModel,
    decoder: Decoder,
    chosen: range,
    reconstructor: BlockReconstructor,
    importances: Callable[[int], Mapping[str, Importance]],
    sizes: Sizes,
    text: Text,
    config: NanoQuantConfig,
    progress: Progress,
    loggers: list[Any] | None,
    recorder: Recorder,
    unfinished: Unfinished,
    option: int,
    memory: ActivationMemory,
) -> dict[int, BlockReport]:
    """Phase 2: the chosen blocks in order, each against the dense block on the dense prefix.

    A block that an earlier run has finished is taken from there; ``option`` is what the sizes belong to, and
    ``importances`` gives those of a block by full name. Several processes make a block together where it is tuned,
    else each makes one of its own.
    """
    reports, ahead = {}, {}
    activations = (
        Activations(model, decoder, text.calibration[: config.block.windows], memory)
        if config.block.tunes
        else None
    )

    def make(b: int, records: Recorder) -> BlockReport:
        known = (importances, sizes, data, config, precision_of(model, config), loggers)
        with at_work(decoder.blocks[b], changes=True):
            return _make_block(decoder, b, reconstructor, *known, records)

    with progress.phase("blocks", len(chosen)):
        for b, block in enumerate(decoder.blocks[: chosen.stop]):
            data = None if activations is None else activations.targets_of(b, block)
            dense = list(block.parameters())
            due = b in chosen and b not in ahead
            kept = unfinished.take_block(decoder, b, sizes, option) if due else None
            if kept is not None:
                reports[b] = kept
                progress.advance(1, note="as it was kept")
            elif b in chosen:
                if b not in ahead:
                    turn = [n for n in chosen if n >= b][
                        : 1 if config.block.tunes else world_size()
                    ]
                    ahead |= make_blocks(decoder, turn, config.block.tunes, make, recorder)
                reports[b] = ahead[b]
                unfinished.keep_block(decoder, b, sizes, option, reports[b])
                worst = _worst(reports[b])
                logger.info("block %d: %s", b, worst)
                progress.advance(1, note=worst)
            if data is not None:
                activations.advance(block, data, f"block {b}")
            forget([*dense, *block.state_dict().values()])
            give_back()
    return reports


def _make_block(
    decoder: Decoder,
    b: int,
    reconstructor: BlockReconstructor,
    importances: Callable[[int], Mapping[str, Importance]],
    sizes: Sizes,
    data: BlockData | None,
    config: NanoQuantConfig,
    precision: str,
    loggers: list[Any] | None,
    recorder: Recorder,
) -> BlockReport:
    """Quantize one block, and record how long it took."""
    full = {name: decoder.full_name(b, name) for name in decoder.linears[b]}
    begun, known = time.perf_counter(), importances(b)
    report = reconstructor(
        decoder.blocks[b],
        decoder.groups[b],
        {name: known[full[name]] for name in full},
        {name: sizes[full[name]] for name in full},
        data,
        name=f"block {b}",
        precision=precision,
        freeze=config.model.train != "signs",
        loggers=loggers,
        recorder=BlockRecorder(recorder, b, full),
    )
    recorder.record("block", block=b, seconds=time.perf_counter() - begun)
    return report


def _worst(report: BlockReport) -> str:
    name, error = max(report.weight_error.items(), key=lambda item: item[1])
    return f"largest weight error {error:.3f} ({name})"


def reconstruct_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    decoder: Decoder,
    text: Text,
    config: NanoQuantConfig,
    progress: Progress,
    loggers: list[Any] | None,
    recorder: Recorder,
    unfinished: Unfinished,
) -> ModelReport:
    """Phase 3: logits of the whole model against the dense teacher's, whose mapped blocks are read one at a time."""
    settings, state = config.model, unfinished.model
    steps = settings.epochs * -(-len(text.training) // settings.batch)
    dense = replace(decoder, blocks=teacher.get_submodule(decoder.path))
    with progress.phase("model", steps - state.done()):
        windows: list[Tensor | Dataset] = [text.training, text.held_out]
        if settings.kept_logits is not None:
            names = ("training", "held-out")
            known = settings.kept_logits, precision_of(teacher, config)
            windows = [
                known_windows(teacher, dense, name, tokens, *known, unfinished)
                for name, tokens in zip(names, windows, strict=True)
            ]
            give_back()
        with paged(dense.blocks):
            report = ModelReconstructor(settings, config.run.seed)(
                model,
                teacher if settings.kept_logits is None else None,
                *windows,
                precision=precision_of(model, config),
                on_step=lambda step, loss: progress.advance(1, note=f"divergence {loss:.3f}"),
                loggers=loggers,
                recorder=recorder,
                state=state,
            )
    gc.collect()  # the trainer and its moments refer to each other
    give_back()
    return report
