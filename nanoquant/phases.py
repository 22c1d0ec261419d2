"""The phases of the method, each on the whole model: calibration, sizes and blocks, the model itself."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Run:
    """What all phases work on, and report to."""

    model: PreTrainedModel
    decoder: Decoder
    chosen: range
    """Blocks that become quantized."""
    text: Text
    progress: Progress
    loggers: list[Any] | None
    recorder: Recorder
    unfinished: Unfinished
    memory: ActivationMemory

    def precision(self, config: NanoQuantConfig) -> str:
        """Of the model, see :func:`precision_of`."""
        return precision_of(self.model, config)


def precision_of(model: PreTrainedModel, config: NanoQuantConfig) -> str:
    """Lightning precision: the config's, or mixed for a bfloat16 model and full for float32."""
    usual = "bf16-mixed" if model.dtype == torch.bfloat16 else "32-true"
    return config.run.precision or usual


def initialize(
    run: Run,
    options: list[NanoQuantConfig],
    reconstructor: BlockReconstructor,
    sensitivity_file: str | Path | None,
    initializer: Initializer | None = None,
) -> Initialized:
    """All that comes before the whole-model phase: importances, sizes, quantized blocks.

    Raises:
        ValueError: blocks are to run one by one, and what they are called with depends on the text.
    """
    importances = run.unfinished.importances
    if options[0].block.tunes or options[0].model.kept_logits is not None:
        check_calls(run.model, run.decoder)
    calibrate(run, options[0])
    choice = choose_sizes(
        run.model,
        run.decoder,
        run.chosen,
        run.text,
        importances,
        options,
        run.progress,
        run.recorder,
        sensitivity_file,
        initializer,
    )
    option = options.index(choice.config)
    reports = reconstruct_blocks(run, reconstructor, choice.sizes, choice.config, option)
    diagonals = importances.diagonals(run.chosen)
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


def calibrate(run: Run, config: NanoQuantConfig) -> None:
    """Phase 1: importances of the linears of the chosen blocks, kept as they come, but those that are kept already."""
    chosen, unfinished = run.chosen, run.unfinished
    done, gradient = unfinished.calibrated(len(run.decoder.blocks), chosen)
    gather(None)  # all processes have read before the first one writes
    if done == chosen.start:
        return
    calibration = BlockwiseCalibration(
        run.model,
        run.decoder,
        run.text.calibration[: config.calibration.windows],
        config.importance,
        config.calibration.batch,
        run.memory,
    )

    def keep(b: int, importances: Mapping[str, Importance]) -> None:
        unfinished.keep_calibrated(b, chosen, importances, calibration.gradient)

    with run.progress.phase("calibrate", passes(done, chosen.start)):
        calibration(chosen, keep, run.progress.advance, done, gradient)
    gather(None)  # the first one has written what all read from now on


def reconstruct_blocks(
    run: Run,
    reconstructor: BlockReconstructor,
    sizes: Sizes,
    config: NanoQuantConfig,
    option: int,
) -> dict[int, BlockReport]:
    """Phase 2: the chosen blocks in order, each against the dense block on the dense prefix.

    A block that an earlier run has finished is taken from there; ``option`` is what the sizes belong to. Several
    processes make a block together where it is tuned, else each makes one of its own.
    """
    decoder, chosen, unfinished = run.decoder, run.chosen, run.unfinished
    reports, ahead = {}, {}
    activations = (
        Activations(run.model, decoder, run.text.calibration[: config.block.windows], run.memory)
        if config.block.tunes
        else None
    )

    def make(b: int, records: Recorder) -> BlockReport:
        with at_work(decoder.blocks[b], changes=True):
            return _make_block(run, b, reconstructor, sizes, data, config, records)

    with run.progress.phase("blocks", len(chosen)):
        for b, block in enumerate(decoder.blocks[: chosen.stop]):
            data = None if activations is None else activations.targets_of(b, block)
            dense = list(block.parameters())
            due = b in chosen and b not in ahead
            kept = unfinished.take_block(decoder, b, sizes, option) if due else None
            if kept is not None:
                reports[b] = kept
                run.progress.advance(1, note="as it was kept")
            elif b in chosen:
                if b not in ahead:
                    turn = [n for n in chosen if n >= b][
                        : 1 if config.block.tunes else world_size()
                    ]
                    ahead |= make_blocks(decoder, turn, config.block.tunes, make, run.recorder)
                reports[b] = ahead[b]
                unfinished.keep_block(decoder, b, sizes, option, reports[b])
                worst = _worst(reports[b])
                logger.info("block %d: %s", b, worst)
                run.progress.advance(1, note=worst)
            if data is not None:
                activations.advance(block, data, f"block {b}")
            forget([*dense, *block.state_dict().values()])
            give_back()
    return reports


def _make_block(
    run: Run,
    b: int,
    reconstructor: BlockReconstructor,
    sizes: Sizes,
    data: BlockData | None,
    config: NanoQuantConfig,
    recorder: Recorder,
) -> BlockReport:
    """Quantize one block, and record how long it took."""
    decoder = run.decoder
    full = {name: decoder.full_name(b, name) for name in decoder.linears[b]}
    begun, known = time.perf_counter(), run.unfinished.importances(b)
    report = reconstructor(
        decoder.blocks[b],
        decoder.groups[b],
        {name: known[full[name]] for name in full},
        {name: sizes[full[name]] for name in full},
        data,
        name=f"block {b}",
        precision=run.precision(config),
        freeze=config.model.train != "signs",
        loggers=run.loggers,
        recorder=BlockRecorder(recorder, b, full),
    )
    recorder.record("block", block=b, seconds=time.perf_counter() - begun)
    return report


def _worst(report: BlockReport) -> str:
    name, error = max(report.weight_error.items(), key=lambda item: item[1])
    return f"largest weight error {error:.3f} ({name})"


def reconstruct_model(run: Run, teacher: PreTrainedModel, config: NanoQuantConfig) -> ModelReport:
    """Phase 3: logits of the whole model against the dense teacher's, whose mapped blocks are read one at a time."""
    settings, state, text = config.model, run.unfinished.model, run.text
    steps = settings.epochs * -(-len(text.training) // settings.batch)
    dense = replace(run.decoder, blocks=teacher.get_submodule(run.decoder.path))
    shown = "loss" if settings.hard_labels else "divergence"
    with run.progress.phase("model", steps - state.done()):
        windows: list[Tensor | Dataset] = [text.training, text.held_out]
        if settings.kept_logits is not None:
            names = ("training", "held-out")
            known = settings.kept_logits, precision_of(teacher, config)
            windows = [
                known_windows(teacher, dense, name, tokens, *known, run.unfinished)
                for name, tokens in zip(names, windows, strict=True)
            ]
            give_back()
        with paged(dense.blocks):
            report = ModelReconstructor(settings, config.run.seed)(
                run.model,
                teacher if settings.kept_logits is None else None,
                *windows,
                precision=run.precision(config),
                on_step=lambda step, loss: run.progress.advance(1, note=f"{shown} {loss:.3f}"),
                loggers=run.loggers,
                recorder=run.recorder,
                state=state,
                memory=run.memory,
            )
    gc.collect()  # the trainer and its moments refer to each other
    give_back()
    return report
