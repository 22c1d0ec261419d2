"""BlockReconstructor: one decoder block from dense to quantized (Phase 2 of the method).

Three phases for each round of linears: tune what is still dense, initialize the round's linears as factors, refine
them: latents and scales of binary ones through the straight-through estimator (Eq. 10), codebooks and scales of
looked-up ones. The loss is the squared error at the block's output, weighted per channel, against the dense block on
the dense prefix's activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.architectures import as_linear, linear_shape
from nanoquant.binary import relative_error
from nanoquant.block_tuning import BlockData, BlockTuner, scale_groups, weight_groups
from nanoquant.heap import give_back
from nanoquant.importance import Importance, stack
from nanoquant.layer_records import BlockWatch
from nanoquant.methods import Initializer, Size, layer_of
from nanoquant.optimizer import OptimizerConfig
from nanoquant.recorder import UNRECORDED, Recorder
from nanoquant.schedules import SCHEDULES, Groups
from nanoquant.training import FitResult


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Phases of a block; rates and epochs of the paper unless a preset says otherwise."""

    schedule: str = "published"
    """published: a round per linear; grouped: per shared input; algorithm1: one round for the whole block."""
    windows: int = 16
    """Calibration windows that the block is tuned on."""
    held_out: int = 0
    """The last of those windows, which no phase of the block trains on: a phase ends when their loss no longer falls,
    in its best state, which may be the untouched one. 0: all windows train, and every epoch runs."""
    patience: int = 1
    """Epochs in a row without a lower loss of the held-out windows that end a phase."""
    dense_epochs: int = 8
    """Epochs of tuning the still dense weights before each round; 0 skips it."""
    joint_epochs: int = 0
    """Epochs of refining all linears of the block together after its last round; 0 skips it."""
    dense_lr: float = 1e-4
    """Rate of the dense weights."""
    dense_batch: int = 4
    """Windows a step while tuning dense weights."""
    refine_epochs: int = 8
    """Epochs of refining latents and scales after each round; 0 skips it."""
    latent_lr: float = 1e-5
    """Rate of the latents."""
    codebook_lr: float = 1e-3
    """Rate of codebooks, where weights are looked up; relative_rates makes it a share of each one's mean magnitude."""
    scale_lr: float = 1e-5
    """Rate of scales and biases."""
    refine_batch: int = 1
    """Windows a step while refining."""
    relative_rates: bool = False
    """Latents are first scaled to mean magnitude 1, and scale_lr is a share of each layer's mean scale."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(epsilon=1e-12))
    """AdamW settings of both tuning phases; the loss is relative, so its gradients are small."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )
        for name in ("dense_epochs", "refine_epochs", "joint_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("windows", "dense_batch", "refine_batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dense_lr", "latent_lr", "codebook_lr", "scale_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.held_out < self.windows:
            raise ValueError(
                f"held_out must leave one of windows={self.windows} to train on and not be negative, "
                f"got {self.held_out}"
            )
        if self.held_out and not self.tunes:
            raise ValueError(
                f"held_out={self.held_out} and no epochs exclude each other: no phase of the block would be stopped; "
                "give dense_epochs, refine_epochs or joint_epochs, or leave it out"
            )

    @property
    def tunes(self) -> bool:
        """Whether any phase needs activations."""
        return bool(self.dense_epochs or self.refine_epochs or self.joint_epochs)


@dataclass
class BlockReport:
    """Errors of one block: importance-weighted error of each weight, and the block's loss phase by phase."""

    weight_error: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    undone: int = 0

    def add(self, phase: str, result: FitResult) -> None:
        """Keep the first loss of the first round and the mean of the last epoch of the last one."""
        self.undone += result.undone
        last = result.losses[-max(1, len(result.losses) // max(1, result.epochs)) :]
        self.loss.setdefault(f"before {phase}", result.losses[0])
        self.loss[f"after {phase}"] = sum(last) / len(last)


class BlockReconstructor(nn.Module):
    """Replace a block's linears by quantized layers, round by round.

    Args:
        config: schedule, epochs, rates.
        initializer: (weight, importance, size, generator) to factors, batched; its factors decide the kind of layer.
        seed: of the start of the initializer and of the order of batches.
    """

    def __init__(self, config: BlockConfig, initializer: Initializer, seed: int = 0) -> None:
        super().__init__()
        self.config, self.initializer, self.seed = config, initializer, seed

    def forward(
        self,
        block: nn.Module,
        groups: Groups,
        importances: Mapping[str, Importance],
        sizes: Mapping[str, Size],
        data: BlockData | None = None,
        *,
        name: str = "block",
        precision: str = "32-true",
        freeze: bool = True,
        loggers: list[Any] | None = None,
        recorder: Recorder = UNRECORDED,
    ) -> BlockReport:
        """Quantize ``block`` in place.

        Args:
            block: decoder block with dense linears.
            groups: names of its linears, those that share an input together, in order of execution.
            importances: name to second moments.
            sizes: name to rank, or to the shape of its codebooks.
            data: activations to tune on; may be absent when the config tunes nothing.
            name: for messages and logs.
            precision: Lightning precision of the tuning loops.
            freeze: fix signs; False keeps their latents, which training signs later starts from.
            loggers: Lightning loggers.
            recorder: takes losses, and errors of the linears after each phase.

        Raises:
            ValueError: a linear has no importance or size, or the config tunes and ``data`` is absent.
        """
        names = [linear for group in groups for linear in group]
        self.check(name, names, importances, sizes, data)
        dtypes = {name: tensor.dtype for name, tensor in _others(block, names)}
        block.requires_grad_(False)
        if self.config.tunes:
            self._prepare(block, names)
        report, watch, tuner = BlockReport(), BlockWatch(recorder, importances), None
        if self.config.tunes:
            watch.keep(block, names)
            weight = importances[names[-1]].output
            settings = (self.config.optimizer, self.seed, name, precision, loggers)
            stop = (self.config.held_out, self.config.patience)
            tuner = BlockTuner(block, data, weight, *settings, *stop)
        for round_names in SCHEDULES[self.config.schedule](groups):
            if self.config.dense_epochs:
                result = self.tune_dense(tuner, names, round_names, report)
                watch.losses("tune dense", result.losses)
                watch.tuned(block, round_names)
            errors = self.initialize(block, round_names, importances, sizes)
            watch.initialized(block, errors)
            report.weight_error |= errors
            if epochs := self.config.refine_epochs:
                watch.losses("refine", self.refine(tuner, round_names, report, epochs).losses)
                watch.refined(block, round_names)
            if freeze and not self.config.joint_epochs:
                self.freeze(block, round_names)
        if epochs := self.config.joint_epochs:
            watch.losses("refine jointly", self.refine(tuner, names, report, epochs).losses)
            watch.refined(block, names)
            if freeze:
                self.freeze(block, names)
        for other, tensor in _others(block, names):
            tensor.data = tensor.data.to(dtypes[other])
        return report

    def check(
        self,
        name: str,
        names: list[str],
        importances: Mapping[str, Importance],
        sizes: Mapping[str, Size],
        data: BlockData | None,
    ) -> None:
        """Refuse what does not suffice for the linears ``names`` of the block ``name``; raises as :meth:`forward`."""
        for what, given in (("importance", importances), ("rank", sizes)):
            missing = [linear for linear in names if linear not in given]
            if missing:
                raise ValueError(
                    f"{name}: no {what} for {', '.join(missing)}; collect statistics for every linear"
                )
        if self.config.tunes and data is None:
            raise ValueError(
                f"{name}: the config tunes the block, so inputs and targets are needed"
            )

    def _prepare(self, block: nn.Module, names: list[str]) -> None:
        """Conv1D to Linear, and copies in float32 of everything while the block is tuned."""
        for linear in names:
            block.set_submodule(linear, as_linear(block.get_submodule(linear)))
        for parameter in block.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)  # others may share it
        block.float()

    def tune_dense(
        self, tuner: BlockTuner, names: list[str], coming: tuple[str, ...], report: BlockReport
    ) -> FitResult:
        """Error propagation mitigation: tune all still dense weights before those of ``coming`` go (step 1)."""
        modules = [tuner.block.get_submodule(linear) for linear in names]
        weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
        groups = [{"params": weights, "lr": self.config.dense_lr}]
        phase = f"tune dense before {', '.join(coming)}"
        result = tuner.fit(phase, groups, self.config.dense_epochs, self.config.dense_batch)
        report.add("tune dense", result)
        return result

    def refine(
        self, tuner: BlockTuner, names: Sequence[str], report: BlockReport, epochs: int
    ) -> FitResult:
        """Factor refinement: weights and scales of the round just initialized (step 3, Eq. 10), or of all."""
        config = self.config
        layers = [tuner.block.get_submodule(linear) for linear in names]
        rates = (config.latent_lr, config.codebook_lr, config.relative_rates)
        groups = weight_groups(layers, *rates)
        for layer in layers:
            groups += scale_groups(layer, config.scale_lr, config.relative_rates)
        phase = f"refine {', '.join(names)}"
        result = tuner.fit(phase, groups, epochs, config.refine_batch)
        report.add("refine", result)
        return result

    def freeze(self, block: nn.Module, names: Sequence[str]) -> None:
        """Fix the signs of these linears."""
        for linear in names:
            block.get_submodule(linear).freeze()

    def initialize(
        self,
        block: nn.Module,
        names: tuple[str, ...],
        importances: Mapping[str, Importance],
        sizes: Mapping[str, Size],
    ) -> dict[str, float]:
        """Put factors in the place of dense linears, equal shapes in one batch; returns weight errors."""
        batches: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for linear in names:
            shape = linear_shape(block.get_submodule(linear))
            known = importances[linear]
            kinds = (known.input_correlation is None, known.output_correlation is None)
            batches[(*shape, *kinds, sizes[linear])].append(linear)
        errors = {}
        for (*_, size), linears in batches.items():
            errors |= self._factorize(block, linears, importances, size)
            give_back()  # else what these freed lies beside what the next ones take
        return errors

    def _factorize(
        self, block: nn.Module, names: list[str], importances: Mapping[str, Importance], size: Size
    ) -> dict[str, float]:
        """:meth:`initialize` of linears of one shape."""
        modules = {linear: as_linear(block.get_submodule(linear)) for linear in names}
        W = torch.stack([dense.weight.detach() for dense in modules.values()]).float()
        importance = stack([importances[linear] for linear in names], W)
        generator = torch.Generator().manual_seed(self.seed)
        factors = self.initializer(W, importance, size, generator)
        weight = importance.output.unsqueeze(-1) * importance.input.unsqueeze(-2)
        error = relative_error(W, factors.dense(), weight)
        for (linear, dense), parts in zip(modules.items(), factors.unbind(), strict=True):
            if self.config.relative_rates:
                parts = parts.normalized()
            block.set_submodule(linear, layer_of(parts, dense.bias))
        return dict(zip(names, error.tolist(), strict=True))


def _others(block: nn.Module, linears: list[str]) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a block outside the linears to quantize, by name."""
    return [
        (name, tensor)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if name.rpartition(".")[0] not in linears
    ]
