"""Phases of a block: which run, how long and at which rates, and what is reported of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nanoquant.fit_result import FitResult
from nanoquant.optimizer import OptimizerConfig
from nanoquant.schedules import SCHEDULES


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
    reassign: int = 0
    """How often within a refinement weights that are looked up choose their indices anew, nearest to the dense weights
    they stand for; its epochs are divided into equal trainings, each with a schedule of its own. Goes without held_out,
    which could not take it back."""
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
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if not 0 <= self.held_out < self.windows:
            raise ValueError(
                f"held_out must leave one of windows={self.windows} to train on and not be negative, "
                f"got {self.held_out}"
            )
        least = min((e for e in (self.refine_epochs, self.joint_epochs) if e), default=0)
        if not 0 <= self.reassign < max(1, least):
            raise ValueError(
                f"reassign must be at least 0 and leave an epoch of each refinement before and after it, got "
                f"{self.reassign} with refine_epochs={self.refine_epochs} and joint_epochs={self.joint_epochs}"
            )
        if self.patience != BlockConfig.patience and not self.held_out:
            raise ValueError(
                f"patience={self.patience} and held_out=0 exclude each other: no phase of the block would be stopped; "
                "give held_out, or leave it out"
            )
        if self.held_out and self.reassign:
            raise ValueError(
                f"held_out={self.held_out} and reassign={self.reassign} exclude each other: the best state of a phase "
                "keeps no indices; leave one out"
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
