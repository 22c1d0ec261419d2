"""What fine-tuning trains, on how much of which text, and what is measured. Shapes: N windows of T tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanoquant.data import make_windows
from nanoquant.optimizer import OptimizerConfig

ALL = "all-linear"


@dataclass(frozen=True, kw_only=True)
class FineTuneJob:
    """What is fine-tuned, on what, and what is measured."""

    checkpoint: str
    """Folder of a packed checkpoint."""
    output: str
    """New or empty folder."""
    text: str
    """Training text: file, JSONL, token ids, or data set as name:config:split."""
    eval_text: str | None = None
    """Text that is measured before and after; null: the held-out windows, which chose the state."""
    eval_windows: int = 64
    """Windows of eval_text."""
    teacher: str | None = None
    """Dense model whose logits are followed; null: the next token of the text."""
    json: str | None = None
    """File for the figures."""


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What trains beside or in a packed model, on how much text, and at which rates."""

    train: str = "lora"
    """lora: low-rank matrices beside packed linears; scales: their scales, or codebooks, and biases and norms."""
    rank: int = 32
    """Rank of the low-rank matrices, which are scaled by 1."""
    targets: str = ALL
    """Last names of the packed linears that get them, with commas, as q_proj,v_proj; all-linear: every one."""
    start: str | None = None
    """Start of the low-rank matrices: zero, or residual: the best of several shares of the packed weights' error, which
    a teacher tells; null: residual where there is a teacher."""
    lora_lr: float = 3e-4
    """Rate of the low-rank matrices, chosen with a teacher and its start; 1e-3 did little without them."""
    scale_lr: float = 1e-2
    """Rate of scales, codebooks, biases and norms, as a share of each tensor's mean magnitude."""
    windows: int = 256
    """Training windows, all different."""
    length: int = 512
    """Tokens of a window, T."""
    epochs: int = 1
    """Passes over the windows."""
    batch: int = 1
    """Windows a step."""
    held_out: int = 8
    """Windows from the end of the text that choose the state that is kept and do not train."""
    evaluations: int = 4
    """How often these are measured, the end included and the start not counted."""
    seed: int = 0
    """Seed of the choice of windows, their order and the start of the low-rank matrices."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(beta2=0.95, clip_norm=1.0, warmup=10)
    )
    """AdamW settings."""

    def __post_init__(self) -> None:
        if self.train not in ("lora", "scales"):
            raise ValueError(f"train must be lora or scales, got {self.train!r}")
        if self.start not in (None, "residual", "zero"):
            raise ValueError(f"start must be residual or zero, got {self.start!r}")
        if self.start == "residual" and self.train == "scales":
            raise ValueError("start=residual and train=scales exclude each other; leave start out")
        for name in ("rank", "windows", "epochs", "batch", "held_out", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, got {self.length}")
        for name in ("lora_lr", "scale_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


def split_windows(
    tokens: Tensor, config: FineTuneConfig, bos: int | None = None
) -> tuple[Tensor, Tensor]:
    """Training windows (N, T), chosen by the seed, and held-out ones from the end of a text.

    Args:
        tokens: ids (n,).
        config: how many, and how long.
        bos: token in front of every window, see ``data.bos_of``.

    Raises:
        ValueError: the text is too short; tells how many windows it has.
    """
    make_windows(tokens, config.length, config.windows + config.held_out, bos)  # or say why not
    windows = make_windows(tokens, config.length, bos_token_id=bos)
    body, held_out = windows[: -config.held_out], windows[-config.held_out :]
    order = torch.randperm(len(body), generator=torch.Generator().manual_seed(config.seed))
    return body[order[: config.windows]], held_out
