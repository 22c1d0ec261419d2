"""quantize: the whole method on a transformers model, in the order of the paper's Algorithm 1."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.activation_memory import ActivationMemory
from nanoquant.architectures import find_decoder
from nanoquant.block_config import BlockReport
from nanoquant.block_reconstruction import BlockReconstructor
from nanoquant.checkpoint import mark_quantized, pack_model
from nanoquant.config import NanoQuantConfig, nanoquant_config
from nanoquant.data_parallel import check_batch
from nanoquant.decoder import Decoder, evaluation_mode
from nanoquant.evaluation.perplexity import check_length
from nanoquant.layer_records import record_model_errors
from nanoquant.lock import exclusive
from nanoquant.methods import Initializer, Size, body_bits, method_of
from nanoquant.mixture import Data
from nanoquant.model_embeddings import (
    check_embeddings,
    embedding_tables,
    put_tables,
    round_embeddings,
)
from nanoquant.model_reconstruction import ModelReport
from nanoquant.non_finite import non_finite
from nanoquant.offload import settle, visits
from nanoquant.phases import Run, initialize, precision_of, reconstruct_model
from nanoquant.processes import broadcast, first, gather, join
from nanoquant.progress import Progress
from nanoquant.ranks import check_budget, decoder_shapes
from nanoquant.recipe import make_recipe
from nanoquant.recorder import UNRECORDED, Recorder
from nanoquant.self_text import PHASE as WRITE_TEXT
from nanoquant.self_text import SelfText
from nanoquant.sensitivity import check_place
from nanoquant.sizes import Sizes, measure_sizes
from nanoquant.text import split_text
from nanoquant.text_plan import TextPlan, plan_text
from nanoquant.twin import twin
from nanoquant.unfinished import Initialized, Unfinished

logger = logging.getLogger(__name__)


@dataclass
class QuantizationReport:
    """What a run did: ranks or codebooks, errors per block, divergence of the model, sizes, seconds, text."""

    config: dict[str, Any]
    ranks: dict[str, Size] = field(default_factory=dict)
    bits: float = 0.0
    blocks: dict[int, BlockReport] = field(default_factory=dict)
    model: ModelReport = field(default_factory=ModelReport)
    sizes: Sizes | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    text: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return asdict(self)


def quantize(
    model: PreTrainedModel,
    data: Data | TextPlan,
    config: NanoQuantConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    initializer: Initializer | None = None,
    progress: Progress | None = None,
    loggers: list[Any] | None = None,
    recorder: Recorder = UNRECORDED,
    sensitivity_file: str | Path | None = None,
    self_text_file: str | Path | None = None,
    work: str | Path | None = None,
) -> QuantizationReport:
    """Quantize a causal language model in place: calibrate, reconstruct blocks, reconstruct the model, pack.

    Under torchrun or SLURM all processes call this alike, share the work, and have the same model afterwards.

    Example::

        quantize(model, "text.txt", nanoquant_config(bits=0.8), tokenizer)
        nanoquant.save_pretrained(model, "out", tokenizer=tokenizer)

    Args:
        model: dense, in bfloat16 or float32; afterwards its linears are packed. One that is larger than the memory
            of its GPU is given after ``nanoquant.offload.offload(model, blocks, device)``.
        data: calibration text, several, or token ids, see :func:`read_sources`; "self" lets the model write all.
        config: bits, preset and everything else.
        tokenizer: of the model; needed for text.
        initializer: in the place of the method's own, as ``ADMMInitializer(config.admm)``; where ranks are measured it
            runs twice, and ``budget={"allocation": "uniform"}`` spares that.
        progress: told about phases.
        loggers: Lightning loggers for the losses.
        recorder: takes errors of layers, losses, rates and flipped signs as they come.
        sensitivity_file: .json file or folder that keeps what budget.allocation=measured measures; with the same
            model, text and settings a later call goes on from it.
        self_text_file: file or folder that keeps the text that the model writes, so that it is written once.
        work: folder that keeps unfinished work, see ``run.save_every``: the same call goes on there. It stays until
            ``nanoquant.unfinished.discard(work)``.

    Raises:
        ValueError: the model, the text or the budget does not allow it, or another process is at work in ``work``;
            says what to change.
        OSError: the disk refuses unfinished work; what was kept until then is whole.
    """
    config, progress = config or nanoquant_config(), progress or Progress()
    if initializer is not None:
        check_nothing_kept(work=work, sensitivity_file=sensitivity_file)
    if sensitivity_file is not None:
        check_place(sensitivity_file)
    join(model.device.type, config.run.timeout)
    recorder = recorder if first() else UNRECORDED
    memory = ActivationMemory(config.run.activation_memory, work)
    plan = plan_text(data, tokenizer, config)
    check_model(model, plan, config)
    decoder = find_decoder(model)
    if config.run.offload and not any(map(visits, decoder.blocks)):
        raise ValueError(
            "run.offload is for the command, and no block of this model visits a device; call "
            "nanoquant.offload.offload(model, blocks, device) before quantize, or leave it out"
        )
    chosen = config.block_range(len(decoder.blocks))
    shapes = decoder_shapes(decoder, chosen)
    options = check_budget(model, decoder, chosen, config)
    write = SelfText(model, tokenizer, config.self_text, config.run.seed, self_text_file, progress)
    text = broadcast(split_text(plan, tokenizer, config, write))
    unfinished = Unfinished(work, model, text, config)
    model.requires_grad_(False)
    teacher = twin(model) if config.model.train != "none" else None
    with exclusive(work), evaluation_mode(model):
        initial = initializer or method_of(config).initializer(config)
        reconstructor = BlockReconstructor(config.block, initial, config.run.seed)
        run = Run(model, decoder, chosen, text, progress, loggers, recorder, unfinished, memory)
        found = read_alike(unfinished, decoder, chosen) or initialize(
            run, options, reconstructor, sensitivity_file, initializer
        )
        config = options[found.option]
        report = QuantizationReport(config.to_dict(), found.sizes, text=text.origin)
        report.bits, report.blocks = body_bits(shapes, found.sizes), found.blocks
        tables = embedding_tables(model, config.embedding)
        if teacher is not None:
            round_embeddings(model, tables)  # so that training sees what is stored
            report.model = reconstruct_model(run, teacher, config)
            record_model_errors(recorder, decoder, teacher, found.importances)
            del teacher
    with progress.phase("pack", 1):
        settle(model)
        pack_model(model)
        put_tables(model, tables)
        progress.advance(1)
    report.sizes, report.seconds = measure_sizes(model), progress.seconds
    texts = [source["source"] for source in text.origin]
    made = make_recipe(model.name_or_path, texts, report.bits, report.config, report.seconds)
    mark_quantized(model, made)
    return report


def check_nothing_kept(**places: str | Path | None) -> None:
    """Refuse places that keep what an own initializer made.

    Raises:
        ValueError: names the argument that gives one.
    """
    for name, place in places.items():
        if place is not None:
            raise ValueError(
                f"{name} and an own initializer exclude each other: what is kept does not tell which one made it"
            )


def read_alike(unfinished: Unfinished, decoder: Decoder, chosen: range) -> Initialized | None:
    """What an earlier run has left of the phases before the whole-model one, on all processes or none.

    Raises:
        ValueError: only some have it, or it belongs to another run.
    """
    found = unfinished.read(decoder, chosen)
    if len(set(gather(found is None))) > 1:
        raise ValueError(
            f"not all processes see the files in {unfinished.folder}; give them one file system"
        )
    return found


def phase_names(config: NanoQuantConfig, writes: bool) -> list[str]:
    """The phases of a config, in order; ``writes``: whether the model writes text for itself."""
    names = [WRITE_TEXT] if writes else []
    names += ["calibrate", *(["ranks"] if config.budget.allocation == "measured" else []), "blocks"]
    return [*names, *(["model"] if config.model.train != "none" else []), "pack"]


def check_model(model: PreTrainedModel, plan: TextPlan, config: NanoQuantConfig) -> None:
    """Refuse what could only fail later.

    Raises:
        ValueError: a step of torchao is asked for, the model has no generation config, weights are not finite (named)
            or float16, the precision or the embedding's group size does not fit, the text has tokens that the model
            does not know, or more logits are to be kept than tokens exist.
    """
    if config.step:
        raise ValueError(
            f"step={config.step!r} is for torchao's quantize_; quantize does all steps, leave it empty"
        )
    if getattr(model, "generation_config", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no generation_config, which says how its texts begin and end; let its class "
            "inherit transformers.GenerationMixin"
        )
    check_finite(model)
    check_batches(config)
    if config.embedding.bits is not None:
        check_embeddings(model, config.embedding)
    if model.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"the model is in {model.dtype}; load it with dtype=torch.bfloat16")
    if precision_of(model, config) == "32-true" and model.dtype != torch.float32:
        raise ValueError(
            f"precision 32-true needs a float32 model, and this one is in {model.dtype}"
        )
    check_length(model, config.calibration.length)
    known = model.get_input_embeddings().num_embeddings
    if (kept := config.model.kept_logits) is not None and kept > known:
        raise ValueError(
            f"model.kept_logits={kept} is more than the {known} tokens that the model knows; give fewer, or null"
        )
    if plan.largest >= known:
        raise ValueError(
            f"the text has token {plan.largest}, but the model knows {known}; tokenize it with its own tokenizer"
        )


def check_batches(config: NanoQuantConfig) -> None:
    """Refuse batches that the processes of this run can't divide.

    Raises:
        ValueError: names the setting and what is allowed.
    """
    block, model = config.block, config.model
    if block.dense_epochs:
        check_batch("block.dense_batch", block.dense_batch)
    if block.refine_epochs or block.joint_epochs:
        check_batch("block.refine_batch", block.refine_batch)
    if model.train != "none":
        check_batch("model.batch", model.batch)


def check_finite(model: nn.Module) -> None:
    """Refuse a model with non-finite weights.

    Raises:
        ValueError: names the tensors.
    """
    broken = non_finite(model.named_parameters())
    if broken:
        raise ValueError(
            f"non-finite weights in {', '.join(broken)}: the source checkpoint is damaged"
        )
