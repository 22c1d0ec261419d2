"""ModelReconstructor: the whole model against its dense teacher, by KL divergence of logits (Phase 3, Eq. 11).

``train="scales"`` is the paper's form: signs frozen, scales trained. ``train="signs"`` also trains the latents
behind the signs (straight-through) together with the norms; that wants fresh text, not a few windows repeated.
The teacher runs at every step, unless what :mod:`nanoquant.kept_logits` keeps of its logits comes with the windows.
The state with the lowest divergence on held-out windows wins; the untouched state is a candidate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nanoquant.best_state import BestState, ModelReport
from nanoquant.block_tuning import scale_groups, vector_group
from nanoquant.compiling import binary_blocks, compiled, passed_blocks
from nanoquant.decoder import evaluation_mode
from nanoquant.divergence import divergence_piece, held_out_divergence, logits_divergence
from nanoquant.kept_logits import as_rows, collate
from nanoquant.layer_records import ModelWatch
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_state import ModelState
from nanoquant.non_finite import first_non_finite
from nanoquant.offload import visits
from nanoquant.optimizer import OptimizerConfig
from nanoquant.recompute import recomputed
from nanoquant.recorder import UNRECORDED, Recorder
from nanoquant.resuming import Order, Start
from nanoquant.student import binary_layers, norm_parameters
from nanoquant.training import Reconstruction, fit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the whole-model phase trains, how long, and at which rates."""

    train: str = "signs"
    """signs: latents, scales and norms; scales: scales only, as in the paper; none: skip the phase."""
    windows: int = 416
    """Training windows, all different."""
    epochs: int = 1
    """Passes over the windows."""
    batch: int = 2
    """Windows a step."""
    latent_lr: float = 1.2e-2
    """Rate of the latents, whose mean magnitude is 1."""
    scale_lr: float = 1e-2
    """Rate of scales (and norms), as a share of each tensor's mean magnitude when relative_rates is on."""
    relative_rates: bool = True
    """Whether scale_lr is a share of the mean magnitude or an absolute rate."""
    held_out: int = 8
    """Windows that choose the best state; they are taken from the end of the training text."""
    evaluations: int = 2
    """How often the held-out divergence is measured, the end included and the start not counted."""
    kept_logits: int | None = None
    """Most probable tokens of the teacher that are kept for each token, with the mass of all others in one bucket, in
    8 bytes each and 4 more a token: no teacher runs while the student trains. null: it runs at every step, which
    needs its memory and gives slightly better results."""
    recompute: bool = False
    """Whether blocks of the student keep their inputs alone for the backward pass, which runs each block again:
    activations of one block at a time, for about a third more time."""
    compile_from: int | None = 64
    """Steps from which on the blocks are compiled before training; null: never."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(beta2=0.95, clip_norm=1.0, warmup=20)
    )
    """AdamW settings."""

    def __post_init__(self) -> None:
        if self.train not in ("signs", "scales", "none"):
            raise ValueError(f"train must be signs, scales or none, got {self.train!r}")
        for name in ("kept_logits", "recompute") if self.train == "none" else ():
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} and train=none exclude each other: nothing trains; leave one of them out"
                )
        for name in ("windows", "epochs", "batch", "held_out", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("latent_lr", "scale_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.kept_logits is not None and self.kept_logits < 1:
            raise ValueError(
                f"kept_logits must be at least 1 token or null, got {self.kept_logits}"
            )


class ModelObjective(nn.Module):
    """Divergence of the student from its teacher; the teacher is no submodule and never trains."""

    name = "model"
    piece = staticmethod(divergence_piece)

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, groups: list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.student, self._teacher, self.groups = student, [teacher], groups

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Latents, scales, norms as the config chose."""
        return self.groups

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean divergence of a batch, see :func:`logits_divergence`."""
        return logits_divergence(self.student, self._teacher[0], batch, self.piece)

    def compiled(self) -> AbstractContextManager[None]:
        """Context in which the blocks of student and teacher that differ, and the divergence, are compiled."""
        blocks = binary_blocks(self.student)
        names = {name for name, module in self.student.named_modules() if module in blocks}
        if self._teacher[0] is not None:
            teacher = self._teacher[0].named_modules()
            blocks += [block for name, block in teacher if name in names and not visits(block)]
        return compiled(blocks, (self, "piece"))


class ModelReconstructor(nn.Module):
    """Train a student whose linears are binary so that its logits follow the dense teacher's.

    Args:
        config: what trains, rates, number of windows.
        seed: of the order of batches.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def forward(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        windows: Tensor | Dataset,
        held_out: Tensor | Dataset,
        *,
        precision: str = "32-true",
        on_step: Callable[[int, float], None] | None = None,
        loggers: list[Any] | None = None,
        recorder: Recorder = UNRECORDED,
        state: ModelState | None = None,
    ) -> ModelReport:
        """Train ``student`` in place and leave it frozen in its best state.

        Args:
            student: causal language model with :class:`BinaryLowRankLinear` layers.
            teacher: the dense model, on the same device; None where its logits are kept.
            windows: training tokens (N, T), or a window (T,) at a time with what is kept of the teacher's logits.
            held_out: the same of those that choose the state.
            precision: Lightning precision.
            on_step: called with (step, loss).
            loggers: Lightning loggers.
            recorder: takes losses, held-out divergence, rates, flipped signs and latents.
            state: keeps the training, and goes on with what it has.

        Raises:
            ValueError: the student has no binary layers, or the state belongs to another run.
            FloatingPointError: the untouched student's divergence is not finite, or training stays so.
        """
        report = ModelReport()
        if self.config.train == "none":
            return report
        layers = binary_layers(student)
        if not layers:
            raise ValueError(
                "the student has no BinaryLowRankLinear layer; quantize its blocks first"
            )
        windows, held = as_rows(windows), DataLoader(as_rows(held_out), collate_fn=collate)
        norms = [(norm, norm.dtype) for norm in norm_parameters(student)]
        with evaluation_mode(student), evaluation_mode(teacher) if teacher else nullcontext():
            groups = self.parameter_groups(student, layers)
            trained = [parameter for group in groups for parameter in group["params"]]
            objective = ModelObjective(student, teacher, groups)
            keeper = BestState(
                trained,
                measure=lambda: held_out_divergence(student, teacher, held, precision),
                locate=lambda: locate_non_finite(objective, next(iter(held)), precision),
                report=report,
            )
            self.train_objective(
                objective, windows, keeper, precision, on_step, loggers, recorder, state
            )
        student.requires_grad_(False)
        for layer in layers.values():
            layer.freeze()
        for norm, dtype in norms:
            norm.data = norm.data.to(dtype)
        return report

    def train_objective(
        self,
        objective: ModelObjective,
        windows: Dataset,
        keeper: BestState,
        precision: str,
        on_step: Callable[[int, float], None] | None,
        loggers: list[Any] | None,
        recorder: Recorder,
        state: ModelState | None,
    ) -> None:
        """Run the loop, look at the held-out windows now and then, and put the best state back."""
        config = self.config
        order = Order(len(windows), config.batch, config.epochs, self.seed)
        loader, steps = DataLoader(windows, batch_sampler=order, collate_fn=collate), order.steps
        report = keeper.report
        start = Start() if state is None else state.resume(keeper)
        order.start = start.batch
        looks = None if state is None else state.looks()
        if looks is None:
            looks = sorted({steps * k // config.evaluations for k in range(config.evaluations)})
        watch = ModelWatch(recorder, binary_layers(objective.student), steps)
        peak = config.latent_lr if config.train == "signs" else config.scale_lr

        def look(step: int) -> None:
            keeper.consider(step)
            recorder.record("model", step=step, held_out=report.held_out[step])

        def follow(step: int, loss: float) -> None:
            if looks and step >= looks[0]:  # a step that was undone is not followed
                looks.pop(0)
                look(step)
            report.losses.append(loss)
            watch.step(step, loss=loss, rate=peak * config.optimizer.rate(step, steps))
            if on_step is not None:
                on_step(step, loss)

        def keep(module: Reconstruction) -> None:
            if state is not None:
                state.keep(module, keeper, looks)

        if looks and looks[0] == 0:
            look(looks.pop(0))
        long = config.compile_from is not None and steps >= config.compile_from
        again = passed_blocks(objective.student) if config.recompute else []
        try:
            with objective.compiled() if long else nullcontext(), recomputed(again):
                result = fit(
                    objective,
                    loader,
                    config.optimizer,
                    epochs=1,  # the order has all of them
                    precision=precision,
                    on_step=follow,
                    loggers=loggers,
                    start=start,
                    at_snapshot=keep,
                )
        except FloatingPointError as error:
            if not report.best_step:
                raise
            text = "%s; training ends here, and the state of step %d is kept"
            logger.warning(text, error, report.best_step)
        else:
            report.undone = result.undone
            watch.finish(steps)
            look(steps)
        keeper.restore()

    def parameter_groups(
        self, student: nn.Module, layers: dict[str, BinaryLowRankLinear]
    ) -> list[dict[str, Any]]:
        """Choose what trains: scales and biases of binary layers; with "signs" latents and norms as well."""
        config = self.config
        student.requires_grad_(False)
        groups = []
        for layer in layers.values():
            groups += scale_groups(layer, config.scale_lr, config.relative_rates)
        if config.train == "signs":
            latents = []
            for layer in layers.values():
                layer.thaw()
                for latent in (layer.U, layer.V):
                    latent.data = latent.data / latent.data.abs().mean()  # it may lie in a file
                    latents.append(latent)
            groups.append({"params": latents, "lr": config.latent_lr})
            for norm in norm_parameters(student):
                norm.data = norm.data.to(torch.float32, copy=True)  # until forward ends
                groups.append(vector_group(norm, config.scale_lr, config.relative_rates))
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return groups


def locate_non_finite(objective: ModelObjective, batch: Sequence[Tensor], precision: str) -> str:
    """Name of what is first non-finite in the student when it reads a batch."""
    device = next(objective.student.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        return first_non_finite(objective, [tensor.to(device) for tensor in batch])
