"""ModelReconstructor: the whole model against its dense teacher, by KL divergence of logits (Phase 3, Eq. 11).

``train="scales"`` is the paper's form: signs frozen, scales trained. ``train="signs"`` also trains the latents
behind the signs (straight-through) together with the norms; that wants fresh text, not a few windows repeated.
Teacher logits are computed when they are needed and never kept. The state with the lowest divergence on
held-out windows wins; the untouched state is a candidate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nanoquant.block_tuning import scale_groups
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.training import OptimizerConfig, RunConfig, fit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the whole-model phase trains, how long, and at which rates."""

    train: str = "signs"
    """signs: latents, scales and norms; scales: scales only, as in the paper; none: skip the phase."""
    windows: int = 320
    """Training windows, all different."""
    epochs: int = 1
    """Passes over the windows."""
    batch: int = 1
    """Windows a step."""
    latent_lr: float = 8e-3
    """Rate of the latents, whose mean magnitude is 1."""
    scale_lr: float = 1e-2
    """Rate of scales (and norms), as a share of each tensor's mean magnitude when relative_rates is on."""
    relative_rates: bool = True
    """Whether scale_lr is a share of the mean magnitude or an absolute rate."""
    held_out: int = 8
    """Windows that choose the best state; they are taken from the end of the training text."""
    evaluations: int = 4
    """How often the held-out divergence is measured, the end included and the start not counted."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(beta2=0.95, clip_norm=1.0, warmup=20)
    )
    """AdamW settings."""

    def __post_init__(self) -> None:
        if self.train not in ("signs", "scales", "none"):
            raise ValueError(f"train must be signs, scales or none, got {self.train!r}")
        for name in ("windows", "epochs", "batch", "held_out", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("latent_lr", "scale_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class ForwardKL(torch.autograd.Function):
    """Mean over tokens of KL(teacher || student), a few tokens at a time in float32 (Eq. 11, T = 1).

    The gradient is formed with the loss, in the dtype of the student's logits, so that no float32 tensor of
    tokens x vocabulary exists.
    """

    chunk = 32

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, student: Tensor, teacher: Tensor
    ) -> Tensor:
        """Divergence of logits (tokens, vocabulary)."""
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        pieces = (x.split(ForwardKL.chunk) for x in (student, teacher, gradient))
        for s, t, g in zip(*pieces, strict=True):
            log_p, log_q = t.float().log_softmax(-1), s.float().log_softmax(-1)
            p = log_p.exp()
            total += p.mul(log_p - log_q).sum()
            g.copy_((log_q.exp() - p) / len(student))
        ctx.save_for_backward(gradient)
        return total / len(student)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient for the student's logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def logits_divergence(student: nn.Module, teacher: nn.Module, windows: Tensor) -> Tensor:
    """KL(teacher || student) per token on windows (n, T); differentiable in the student."""
    with torch.no_grad():
        reference = teacher(input_ids=windows, use_cache=False).logits.flatten(0, 1)
    logits = student(input_ids=windows, use_cache=False).logits.flatten(0, 1)
    return ForwardKL.apply(logits, reference)


class ModelObjective(nn.Module):
    """Divergence of the student from its teacher; the teacher is no submodule and never trains."""

    name = "model"

    def __init__(
        self, student: nn.Module, teacher: nn.Module, groups: list[dict[str, Any]]
    ) -> None:
        super().__init__()
        self.student, self._teacher, self.groups = student, [teacher], groups

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Latents, scales, norms as the config chose."""
        return self.groups

    def forward(self, batch: tuple[Tensor]) -> Tensor:
        """Mean divergence of (windows (n, T),)."""
        return logits_divergence(self.student, self._teacher[0], batch[0])


@dataclass
class ModelReport:
    """Divergence on training steps and on held-out windows, and the step whose state was kept."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    best_step: int = 0


class ModelReconstructor(nn.Module):
    """Train a student whose linears are binary so that its logits follow the dense teacher's.

    Args:
        config: what trains, rates, number of windows.
        run: devices.
    """

    def __init__(self, config: ModelConfig, run: RunConfig | None = None) -> None:
        super().__init__()
        self.config, self.run = config, run or RunConfig()

    def forward(
        self,
        student: nn.Module,
        teacher: nn.Module,
        windows: Tensor,
        held_out: Tensor,
        *,
        precision: str = "32-true",
        on_step: Callable[[int, float], None] | None = None,
        loggers: list[Any] | None = None,
    ) -> ModelReport:
        """Train ``student`` in place and leave it frozen in its best state.

        Args:
            student: causal language model with :class:`BinaryLowRankLinear` layers.
            teacher: the dense model.
            windows: training tokens (N, T).
            held_out: tokens (M, T) that choose the state.
            precision: Lightning precision.
            on_step: called with (step, loss).
            loggers: Lightning loggers.

        Raises:
            ValueError: the student has no binary layers.
        """
        report = ModelReport()
        if self.config.train == "none":
            return report
        layers = {n: m for n, m in student.named_modules() if isinstance(m, BinaryLowRankLinear)}
        if not layers:
            raise ValueError(
                "the student has no BinaryLowRankLinear layer; quantize its blocks first"
            )
        groups = self.parameter_groups(student, layers)
        keeper = _BestState(
            student, teacher, held_out, [p for g in groups for p in g["params"]], precision, report
        )
        objective = ModelObjective(student, teacher, groups)
        shuffle = torch.Generator().manual_seed(self.run.seed)
        loader = DataLoader(
            TensorDataset(windows), batch_size=self.config.batch, shuffle=True, generator=shuffle
        )
        steps = self.config.epochs * len(loader)
        every = max(1, steps // self.config.evaluations)

        def follow(step: int, loss: float) -> None:
            if step and step % every == 0 and steps - step >= every // 2:
                keeper.consider(step)
            if on_step is not None:
                on_step(step, loss)

        keeper.consider(0)
        result = fit(
            objective,
            loader,
            self.config.optimizer,
            epochs=self.config.epochs,
            run=self.run,
            precision=precision,
            on_step=follow,
            loggers=loggers,
        )
        report.losses = result.losses
        keeper.consider(steps)
        keeper.restore()
        student.requires_grad_(False)
        for layer in layers.values():
            layer.freeze()
        return report

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
                    latent.data /= latent.data.abs().mean()
                    latents.append(latent)
            groups.append({"params": latents, "lr": config.latent_lr})
            groups += [_norm_group(p, config) for p in norm_parameters(student)]
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        return groups


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """One-dimensional parameters of normalisation modules, found by the class name."""
    return [
        parameter
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and not isinstance(module, BinaryLowRankLinear)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 1
    ]


def _norm_group(parameter: nn.Parameter, config: ModelConfig) -> dict[str, Any]:
    parameter.data = parameter.data.float()
    size = float(parameter.data.abs().mean()) if config.relative_rates else 1.0
    return {"params": [parameter], "lr": config.scale_lr * max(size, 1e-3)}


@dataclass
class _BestState:
    """Measures held-out divergence and keeps a copy of the parameters where it was lowest."""

    student: nn.Module
    teacher: nn.Module
    windows: Tensor
    parameters: list[nn.Parameter]
    precision: str
    report: ModelReport
    state: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def consider(self, step: int) -> None:
        """Measure, and keep the state when it is the best so far."""
        device = next(self.student.parameters()).device
        with _autocast(device, self.precision):
            losses = [
                float(logits_divergence(self.student, self.teacher, window.to(device)))
                for window in self.windows.split(1)
            ]
        value = sum(losses) / len(losses)
        logger.info("model reconstruction, step %d: held-out divergence %.4f", step, value)
        if value < min(self.report.held_out.values(), default=float("inf")):
            self.state = [p.detach().clone() for p in self.parameters]
            self.report.best_step = step
        self.report.held_out[step] = value

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best state back."""
        for parameter, value in zip(self.parameters, self.state, strict=True):
            parameter.copy_(value)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context that Lightning uses for this precision."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
