"""ModelReconstructor: the whole model against its dense teacher, by KL divergence of logits (Phase 3, Eq. 11).

``train="scales"`` is the paper's form: signs frozen, scales trained. ``train="signs"`` also trains latents behind the
signs (straight-through), or codebooks, together with norms; that wants fresh text, not a few windows repeated.
The teacher runs at every step, unless what :mod:`nanoquant.kept_logits` keeps of its logits comes with the windows.
The state with the lowest divergence on held-out windows wins; the untouched state is a candidate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nanoquant.best_state import BestState, ModelReport
from nanoquant.block_tuning import scale_groups, tensor_group, weight_groups
from nanoquant.compiling import compiled, passed_blocks, quantized_blocks
from nanoquant.course import Course
from nanoquant.decoder import evaluation_mode
from nanoquant.divergence import divergence_piece, held_out_divergence, logits_divergence
from nanoquant.kept_logits import as_rows, collate
from nanoquant.model_state import ModelState
from nanoquant.non_finite import locate_non_finite
from nanoquant.offload import settle, visits
from nanoquant.optimizer import OptimizerConfig
from nanoquant.processes import world_size
from nanoquant.recompute import recomputed
from nanoquant.recorder import UNRECORDED, Recorder
from nanoquant.resuming import Order
from nanoquant.sharding import idle, put_back, sharded
from nanoquant.shards import is_shard
from nanoquant.student import norm_parameters, prepared, quantized_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the whole-model phase trains, how long, and at which rates."""

    train: str = "signs"
    """signs: latents behind the signs, or codebooks, with scales and norms; scales: scales only, as in the paper; none:
    skip the phase."""
    windows: int = 416
    """Training windows, all different."""
    epochs: int = 1
    """Passes over the windows."""
    batch: int = 2
    """Windows a step."""
    latent_lr: float = 1.2e-2
    """Rate of the latents, whose mean magnitude is 1."""
    codebook_lr: float = 1e-2
    """Rate of codebooks, where weights are looked up; relative_rates makes it a share of each one's mean magnitude."""
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
    shard: bool = False
    """Whether the processes of a run divide latents, their gradients, moments and copies, by FSDP2: each holds its
    part of 28 bytes a latent, and a block is gathered where it runs. One process has all of it."""
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
        for name in ("latent_lr", "codebook_lr", "scale_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        for name, what in (("kept_logits", "token"), ("compile_from", "step")):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1 {what} or null, got {getattr(self, name)}"
                )
        if self.shard and (self.train != "signs" or self.optimizer.state_bits != 32):
            raise ValueError(
                f"shard divides latents and moments of 32 bits, got train={self.train!r} and "
                f"optimizer.state_bits={self.optimizer.state_bits}; take train='signs' and 32 bits, or leave shard out"
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
        self.sharded = any(map(is_shard, student.parameters()))

    @property
    def teacher(self) -> nn.Module | None:
        """As given."""
        return self._teacher[0]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Latents, scales, norms as the config chose."""
        return self.groups

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean divergence of a batch, see :func:`logits_divergence`; 0 of an empty one."""
        if not len(batch):
            return self.idle()
        return logits_divergence(self.student, self.teacher, batch, self.piece)

    def idle(self) -> Tensor:
        """0 of no window, see :func:`idle`."""
        return idle(self.student)

    def compiled(self) -> AbstractContextManager[None]:
        """Context in which the blocks of student and teacher that differ, and the divergence, are compiled."""
        blocks = quantized_blocks(self.student)
        names = {name for name, module in self.student.named_modules() if module in blocks}
        if self.teacher is not None:
            teacher = self.teacher.named_modules()
            blocks += [block for name, block in teacher if name in names and not visits(block)]
        return compiled(blocks, (self, "piece"))


class ModelReconstructor(nn.Module):
    """Train a student whose linears are quantized so that its logits follow the dense teacher's.

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
            student: causal language model with layers of either method.
            teacher: the dense model, on the same device; None where its logits are kept.
            windows: training tokens (N, T), or a window (T,) at a time with what is kept of the teacher's logits.
            held_out: the same of those that choose the state.
            precision: Lightning precision.
            on_step: called with (step, loss).
            loggers: Lightning loggers.
            recorder: takes losses, held-out divergence, rates, flipped signs and latents.
            state: keeps the training, and goes on with what it has.

        Raises:
            ValueError: the student has no quantized layers, or the state belongs to another run.
            FloatingPointError: the untouched student's divergence is not finite, or training stays so.
        """
        report = ModelReport()
        if self.config.train == "none":
            return report
        layers = quantized_layers(student)
        if not layers:
            raise ValueError("the student has no quantized layer; quantize its blocks first")
        norms = [(norm, norm.dtype) for norm in norm_parameters(student)]
        with evaluation_mode(student), evaluation_mode(teacher) if teacher else nullcontext():
            divided = self.config.shard and world_size() > 1
            body = sharded(student) if divided else prepared(settle(student), self.config.train)
            objective = ModelObjective(body, teacher, self.parameter_groups(body))
            keeper = self.keeper(objective, as_rows(held_out), precision, report)
            self.train_objective(
                *(objective, as_rows(windows), keeper, precision, on_step, loggers),
                *(recorder, state),
            )
            if divided:
                put_back(body, student)
                settle(student)
        student.requires_grad_(False)
        for layer in layers.values():
            layer.freeze()
        for norm, dtype in norms:
            norm.data = norm.data.to(dtype)
        return report

    def keeper(
        self, objective: ModelObjective, held_out: Dataset, precision: str, report: ModelReport
    ) -> BestState:
        """What chooses the best state by held-out windows."""
        student, teacher = objective.student, objective.teacher
        held = DataLoader(held_out, collate_fn=collate)
        return BestState(
            [parameter for group in objective.groups for parameter in group["params"]],
            measure=lambda: held_out_divergence(
                student, teacher, held, precision, objective.idle if objective.sharded else None
            ),
            locate=lambda: locate_non_finite(objective, next(iter(held)), precision),
            report=report,
        )

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
        layers = quantized_layers(objective.student)
        latent = any(layer.latents() for layer in layers.values())
        peak = config.latent_lr if latent else config.codebook_lr
        if config.train == "scales":
            peak = config.scale_lr
        course = Course(
            *(keeper, layers, recorder, order.steps, config.evaluations),
            rate=lambda step: peak * config.optimizer.rate(step, order.steps),
            on_step=on_step,
            state=state,
        )
        if 2 * config.optimizer.warmup >= order.steps:
            logger.info(
                "warm-up takes %d of %d steps of the model's training; give it more windows, or lower "
                "model.optimizer.warmup",
                *(min(config.optimizer.warmup, order.steps), order.steps),
            )
        ways = self.ways(objective, order.steps)
        course.run(objective, windows, order, config.optimizer, precision, loggers, ways)

    @contextmanager
    def ways(self, objective: ModelObjective, steps: int) -> Iterator[None]:
        """Context in which blocks are compiled where there are enough steps, and run again where that is asked for."""
        least = self.config.compile_from
        again = passed_blocks(objective.student) if self.config.recompute else []
        compiled = nullcontext if least is None or steps < least else objective.compiled
        with compiled(), recomputed(again):
            yield

    def parameter_groups(self, student: nn.Module) -> list[dict[str, Any]]:
        """Scales and biases; with "signs" latents or codebooks, and norms, as well; all ready to train."""
        config, layers = self.config, quantized_layers(student).values()
        scales = (config.scale_lr, config.relative_rates)
        groups = [group for layer in layers for group in scale_groups(layer, *scales)]
        if config.train == "signs":
            rates = (config.latent_lr, config.codebook_lr, config.relative_rates)
            groups += weight_groups(layers, *rates)
            groups += [tensor_group(norm, *scales) for norm in norm_parameters(student)]
        return groups
