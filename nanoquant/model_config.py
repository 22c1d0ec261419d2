"""ModelConfig: what the whole-model phase trains, how long, and at which rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nanoquant.optimizer import OptimizerConfig


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
    8 bytes each and 4 more a token: no teacher runs while the student trains. null: it is asked at every step, which
    needs its memory and gives slightly better results."""
    hard_labels: float = 0.0
    """Share of the text's own next token in the target while the student trains; the teacher has the rest. Perplexity
    on text of that kind falls, and the student departs from the dense model. The held-out divergence, which chooses
    the state, is without it. Text that the model wrote itself tells nothing this way that the teacher does not."""
    keep_states: bool = True
    """With several epochs, one process, no kept_logits: whether what the teacher's last block gives is kept, a hidden
    state a token. Where all windows of a step were met before, since the process began, its head runs alone."""
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
        for name in ("kept_logits", "hard_labels", "recompute") if self.train == "none" else ():
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
        if not 0 <= self.hard_labels < 1:
            raise ValueError(
                f"hard_labels is a share, at least 0 and below 1, got {self.hard_labels}"
            )
        if self.shard and (self.train != "signs" or self.optimizer.state_bits != 32):
            raise ValueError(
                f"shard divides latents and moments of 32 bits, got train={self.train!r} and "
                f"optimizer.state_bits={self.optimizer.state_bits}; take train='signs' and 32 bits, or leave shard out"
            )

    @property
    def recalls(self) -> bool:
        """Whether one process keeps states of the teacher; of several each meets other windows in each epoch."""
        asks = self.train != "none" and self.kept_logits is None
        return asks and self.keep_states and self.epochs > 1
