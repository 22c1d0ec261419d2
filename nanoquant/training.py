"""The only optimization loop: one LightningModule around any objective, and one ``fit``.

An objective is an ``nn.Module`` whose ``forward(batch)`` gives a scalar loss and whose ``parameter_groups()``
names what trains and at which rate. Blocks and whole models differ in their objective, in nothing else.

Measured against a bare loop on 2 CPU cores, Lightning costs 15 ms a fit and 2 ms a step: 1 to 2 percent of a block's
tuning, 0.1 percent of a whole model's.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nanoquant.data_parallel import mean, part_of, placement
from nanoquant.fit_result import FitResult
from nanoquant.non_finite import StaysNonFiniteError, first_non_finite, has_bad_gradient
from nanoquant.optimizer import OptimizerConfig, adamw
from nanoquant.processes import gather, world_size
from nanoquant.resuming import Start
from nanoquant.shards import is_shard, whole
from nanoquant.units import parse_bytes

logger = logging.getLogger(__name__)

PRECISIONS = ("bf16-mixed", "32-true")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the loops run."""

    accelerator: str = "auto"
    """Where the command puts the model: cpu, cuda or gpu, or auto: a GPU if there is one. Loops run where it is."""
    precision: str | None = None
    """Lightning precision, bf16-mixed or 32-true; null: bf16-mixed for a bfloat16 model, else 32-true."""
    seed: int = 0
    """Seed of the choice of text, the order of batches and the start of ADMM."""
    save_every: float | None = 600.0
    """Seconds between two copies, on the disk, of calibration's gradient and of an unfinished whole-model phase, at 16
    bytes a latent: a killed run goes on there. Blocks are kept one by one. null: none, and it begins anew."""
    timeout: float = 1800.0
    """Seconds that one of several processes waits for the others before it gives them up for lost."""

    activation_memory: str | None = None
    """Most memory of the activations that calibration and blocks keep, and with model.keep_states the model's training,
    such as 4GB; the rest lies in files without a name in the work folder, and decides nothing. null: all in memory."""

    offload: bool = False
    """Whether decoder blocks of the dense model stay in main memory, or in their files, and visit the GPU when they
    run, at most two at once. With model.kept_logits none of them does while the student trains, with model.keep_states
    none for windows that come again. Decides nothing of the result."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 to {2**63 - 1}, got {self.seed}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {self.timeout}")
        if self.activation_memory is not None:
            parse_bytes(self.activation_memory, "run.activation_memory")
        if self.save_every is not None and not 0 <= self.save_every < math.inf:
            raise ValueError(
                f"save_every must be a finite number of seconds from 0 or null, got {self.save_every}"
            )
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(
                f"precision must be {' or '.join(PRECISIONS)} (latents stay float32), got {self.precision!r}"
            )


class Objective(Protocol):
    """What ``fit`` trains."""

    name: str

    def __call__(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Scalar loss of one batch; 0 of an empty one, where parameters are shards."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups with their own ``lr``."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of ``nn.Module``."""


class Reconstruction(L.LightningModule):
    """Trains an objective; a step that leads to a non-finite loss is undone and its layer named.

    Args:
        objective: loss and parameter groups.
        config: optimizer settings.
        steps: number of optimizer steps, for the schedule.
        on_step: called with (step, loss) before the parameters of that step move.
        start: where a run goes on, see :class:`Start`.
        at_snapshot: called with the module at every 16th step whose loss is finite, before it.
    """

    snapshot_every = 16
    most_undone = 3

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        steps: int,
        on_step: Callable[[int, float], None] | None = None,
        start: Start | None = None,
        at_snapshot: Callable[[Reconstruction], None] | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.config, self.steps, self.on_step = objective, config, steps, on_step
        self.start, self.at_snapshot = start or Start(), at_snapshot
        self.sharded = any(is_shard(p) for _, p in objective.named_parameters())
        self.result = FitResult(undone=self.start.undone)
        self.good: list[Tensor] = []
        self.bad: tuple[str, str] | None = None  # what is not finite in this step, and where

    def configure_model(self) -> None:
        """Nothing: objectives come as they are trained, shards too; Lightning asks for the hook."""

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and the schedule of the config."""
        config = self.config
        optimizer = adamw(self.objective.parameter_groups(), config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: config.rate(self.start.step + step, self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Dropout stays off: targets come from a model in evaluation mode. Moments go on from where they were."""
        self.eval()
        if self.start.moments:
            optimizer = self.optimizers(use_pl_optimizer=False)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self.start.moments, "param_groups": groups})
            self.good = [p.detach().clone() for p in self.trained()]

    @property
    def step(self) -> int:
        """Steps done, those of an earlier run included."""
        return self.start.step + self.global_step

    def training_step(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Loss of the objective; one that is not finite is undone before the optimizer's step."""
        windows = 1 if world_size() == 1 else len(batch[0]) if batch else 0
        runs = windows > 0 or self.sharded
        loss = self.objective(batch) if runs else 0 * sum(p.sum() for p in self.trained())
        value, factor = mean(float(loss.detach()), windows)
        if not math.isfinite(value):
            found = first_non_finite(self.objective, batch) if runs else ""
            where = next(filter(None, gather(found)))
            self.bad = (f"loss is {value}", where)
            return loss
        if self.step % self.snapshot_every == 0:
            self.good = [p.detach().clone() for p in self.trained()]
            if self.at_snapshot is not None:  # what it keeps is good as well
                self.at_snapshot(self)
        self.result.losses.append(value)
        self.log(f"{self.objective.name}/loss", value)
        if self.on_step is not None:
            self.on_step(self.step, value)
        return loss if factor == 1 else loss * factor

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients; drop them, so that nothing moves, when one is not finite."""
        trained = self.trained()
        if self.bad is not None:
            self.undo(*self.bad)
            self.bad = None
            return
        norm = whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        if not norm.isfinite():
            names = (name for name, p in self.objective.named_parameters() if has_bad_gradient(p))
            self.count_undone("a gradient is not finite", next(names, "the norm of all of them"))
            for parameter in trained:
                parameter.grad = None
        elif 0 < self.config.clip_norm < norm:
            nn.utils.clip_grads_with_norm_(trained, self.config.clip_norm, norm)

    def trained(self) -> list[nn.Parameter]:
        """Parameters of all groups."""
        groups = self.optimizers(use_pl_optimizer=False).param_groups
        return [parameter for group in groups for parameter in group["params"]]

    def undo(self, what: str, where: str) -> None:
        """Return to the last good values, and forget the moments that led away from them."""
        self.count_undone(what, where, "the values of the last good snapshot are put back")
        with torch.no_grad():
            for parameter, value in zip(self.trained(), self.good, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        self.optimizers(use_pl_optimizer=False).state.clear()

    def count_undone(self, what: str, where: str, remedy: str = "the step is undone") -> None:
        """Warn, naming the layer; give up when there is nothing to return to or it happens too often."""
        message = f"{self.objective.name}: {what} at step {self.step}, first in {where}"
        self.result.undone += 1
        if self.result.undone > self.most_undone or not self.good:
            raise StaysNonFiniteError(
                f"{message}; lower its learning rate, or look at its input activations",
                self.result.undone,
                self.result.losses,
            )
        logger.warning("%s; %s", message, remedy)


def fit(
    objective: Objective,
    batches: DataLoader,
    config: OptimizerConfig,
    *,
    epochs: int,
    precision: str,
    on_step: Callable[[int, float], None] | None = None,
    loggers: list[Any] | None = None,
    start: Start | None = None,
    at_snapshot: Callable[[Reconstruction], None] | None = None,
    callbacks: list[L.Callback] | None = None,
) -> FitResult:
    """Train ``objective`` on ``batches`` for ``epochs`` with Lightning, on the device where it is.

    Several processes each take a part of every batch; the gradient is that of the whole one.

    Args:
        objective: see :class:`Objective`; it is trained in place and left on the device it was on.
        batches: gives what the objective takes; not a list, which Lightning reads as several loaders.
        config: optimizer and schedule.
        epochs: passes over ``batches``.
        precision: Lightning precision string.
        on_step: called with (step, loss) before the parameters of that step move.
        loggers: Lightning loggers that receive the loss under the objective's name.
        start: where an earlier run stopped; ``batches`` are those that are left.
        at_snapshot: called with the module at every 16th step whose loss is finite, before it.
        callbacks: of Lightning's trainer.

    Returns:
        The losses.

    Raises:
        StaysNonFiniteError: the loss stays non-finite although its steps were undone.
    """
    steps = (start.step if start else 0) + epochs * len(batches)
    device = next(p for _, p in objective.named_parameters()).device
    module = Reconstruction(objective, config, steps, on_step, start, at_snapshot)
    with _quiet():
        trainer = L.Trainer(
            **placement(device, module.sharded),
            max_epochs=epochs,
            precision=precision,
            logger=loggers or False,
            callbacks=callbacks,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        try:
            trainer.fit(module, part_of(batches))
        except SystemExit as stop:  # Lightning's answer to Ctrl-C
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise stop.__context__ from None
            raise
        finally:
            if not module.sharded:
                objective.to(device)  # Lightning leaves it on the CPU
        module.result.epochs = trainer.current_epoch
    return module.result


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's hints about workers and devices, which a user of ours can't act on."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning(\.|$)")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        try:
            yield
        finally:
            log.setLevel(level)
