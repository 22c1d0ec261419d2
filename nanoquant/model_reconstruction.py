"""ModelReconstructor: the whole model against its dense teacher, by KL divergence of logits (Phase 3, Eq. 11).

``train="scales"`` is the paper's form: signs frozen, scales trained. ``train="signs"`` also trains latents behind the
signs (straight-through), or codebooks, together with norms; that wants fresh text, not a few windows repeated.
The text's own next tokens may have a share of the target (``hard_labels``).
The teacher is asked at every step, and has its last block's states of windows that come again
(:mod:`nanoquant.recall`), unless what :mod:`nanoquant.kept_logits` keeps of its logits comes with the windows.
The state with the lowest divergence on held-out windows wins; the untouched state is a candidate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nanoquant.activation_memory import ActivationMemory
from nanoquant.best_state import BestState, ModelReport
from nanoquant.block_tuning import scale_groups, tensor_group, weight_groups
from nanoquant.compiling import compiled, passed_blocks, quantized_blocks
from nanoquant.course import Course
from nanoquant.decoder import evaluation_mode
from nanoquant.divergence import divergence_piece, held_out_divergence, logits_divergence
from nanoquant.kept_logits import as_rows, collate
from nanoquant.model_config import ModelConfig
from nanoquant.model_state import ModelState
from nanoquant.non_finite import locate_non_finite
from nanoquant.offload import settle, visits
from nanoquant.processes import world_size
from nanoquant.recall import Recall, recalling
from nanoquant.recompute import recomputed
from nanoquant.recorder import UNRECORDED, Recorder
from nanoquant.resuming import Order
from nanoquant.sharding import idle, put_back, sharded
from nanoquant.shards import is_shard
from nanoquant.student import norm_parameters, prepared, quantized_layers

logger = logging.getLogger(__name__)


class ModelObjective(nn.Module):
    """Divergence of the student from its target; the teacher is no submodule and never trains."""

    name = "model"
    piece = staticmethod(divergence_piece)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Recall | None,
        groups: list[dict[str, Any]],
        share: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self._teacher, self.groups, self.share = student, [teacher], groups, share
        self.sharded = any(map(is_shard, student.parameters()))

    @property
    def teacher(self) -> nn.Module | Recall | None:
        """As given."""
        return self._teacher[0]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Latents, scales, norms as the config chose."""
        return self.groups

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Mean loss of a batch, see :func:`logits_divergence`; 0 of an empty one."""
        if not len(batch):
            return self.idle()
        return logits_divergence(self.student, self.teacher, batch, self.piece, self.share)

    def idle(self) -> Tensor:
        """0 of no window, see :func:`idle`."""
        return idle(self.student)

    def compiled(self) -> AbstractContextManager[None]:
        """Context in which the blocks of student and teacher that differ, and the divergence, are compiled."""
        blocks = quantized_blocks(self.student)
        names = {name for name, module in self.student.named_modules() if module in blocks}
        teacher = self.teacher.teacher if isinstance(self.teacher, Recall) else self.teacher
        if teacher is not None:
            modules = teacher.named_modules()
            blocks += [block for name, block in modules if name in names and not visits(block)]
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
        memory: ActivationMemory | None = None,
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
            memory: where states of the teacher lie.

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
            training, looks = as_rows(windows), as_rows(held_out)
            if teacher is not None and self.config.recalls and world_size() == 1:
                teacher = recalling(teacher, body, len(training) + len(looks), memory)
            groups = self.parameter_groups(body)
            objective = ModelObjective(body, teacher, groups, self.config.hard_labels)
            keeper = self.keeper(objective, looks, precision, report)
            self.train_objective(
                *(objective, training, keeper, precision, on_step, loggers),
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
