"""Tuning one decoder block against targets: the objective, and the loop's data and bookkeeping.

The loss is the squared error at the block's output, weighted per output channel. Who calls decides what trains.
Shapes: N windows, T tokens a window, d hidden size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nanoquant.decoder import BlockCall, run_block
from nanoquant.early_stop import EarlyStop
from nanoquant.fit_result import FitResult
from nanoquant.mapped import forget
from nanoquant.methods import Layer
from nanoquant.non_finite import StaysNonFiniteError
from nanoquant.optimizer import OptimizerConfig
from nanoquant.processes import divided
from nanoquant.shards import whole
from nanoquant.training import fit

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 26
"""Activations that are squared at once, in float32."""


@dataclass(frozen=True)
class BlockData:
    """What a block is tuned on: inputs and targets (N, T, d), and the rest of its call."""

    inputs: Tensor
    targets: Tensor
    call: BlockCall


class Windows(Dataset):
    """Inputs and targets of the first ``count`` windows, (T, d) each, as copies that hold no memory of a file."""

    def __init__(self, data: BlockData, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, window: int) -> tuple[Tensor, Tensor]:
        pair = (self.data.inputs[window], self.data.targets[window])
        copies = tuple(x.clone() for x in pair)
        forget(pair)
        return copies


class BlockObjective(nn.Module):
    """Weighted squared error at a block's output, relative to the weighted energy of the targets.

    Args:
        name: for messages and logs.
        block: the decoder block, trained in place.
        data: inputs, targets, call.
        weight: importance of each output channel (d,), mean 1.
        groups: what trains.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        data: BlockData,
        weight: Tensor,
        groups: list[dict[str, Any]],
    ) -> None:
        super().__init__()
        self.name, self.block, self.call, self.groups = name, block, data.call, groups
        self.register_buffer(
            "weight", weight / (weight * mean_square(data.targets).to(weight)).sum()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups given to the constructor."""
        return self.groups

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of (inputs, targets), both (n, T, d)."""
        inputs, targets = batch
        error = run_block(self.block, inputs, self.call).float() - targets.float()
        return (self.weight * error.square().mean(dim=(0, 1))).sum()


def mean_square(targets: Tensor) -> Tensor:
    """Mean square of each channel (d,) of targets (N, T, d), in float32, a few windows at a time."""
    total, windows = 0.0, max(1, CHUNK_ELEMENTS // targets[0].numel())
    for part in targets.split(windows):
        total = total + part.float().square().mean((0, 1)) * (len(part) / len(targets))
        forget([part])
    return total


def scale_groups(layer: Layer, lr: float, relative: bool) -> list[dict[str, Any]]:
    """Optimizer groups of a layer's scales and bias, see :func:`tensor_group`."""
    return [tensor_group(tensor, lr, relative) for tensor in layer.vectors()]


def weight_groups(
    layers: Iterable[Layer], latent_lr: float, codebook_lr: float, relative: bool
) -> list[dict[str, Any]]:
    """Optimizer groups of what scales multiply: latents of all layers, and each codebook, see :func:`tensor_group`."""
    layers = list(layers)
    latents = [latent for layer in layers for latent in layer.latents()]
    books = [book for layer in layers for book in layer.codebooks()]
    groups = [{"params": latents, "lr": latent_lr}] if latents else []
    return groups + [tensor_group(book, codebook_lr, relative) for book in books]


def tensor_group(tensor: nn.Parameter, lr: float, relative: bool) -> dict[str, Any]:
    """Optimizer group of one tensor; ``relative`` makes ``lr`` a share of its mean magnitude, at least 1e-3."""
    size = max(float(whole(tensor.detach()).abs().mean()), 1e-3) if relative else 1.0
    return {"params": [tensor], "lr": lr * size}


@dataclass(frozen=True)
class BlockTuner:
    """Trains chosen parameters of one block; everything that stays the same between its phases."""

    block: nn.Module
    data: BlockData
    weight: Tensor
    optimizer: OptimizerConfig
    seed: int
    name: str
    precision: str
    loggers: list[Any] | None = None
    held_out: int = 0
    """Last windows of the data, which stop a phase and do not train; 0: none."""
    patience: int = 1
    """Epochs without a lower held-out loss that end a phase."""

    def __post_init__(self) -> None:
        channels = self.data.targets.shape[-1]
        if self.weight.shape != (channels,):
            raise ValueError(
                f"{self.name}: the weight of the loss has shape {tuple(self.weight.shape)}, but the block has "
                f"{channels} output channels"
            )
        windows = len(self.data.inputs)
        if self.held_out >= windows:
            raise ValueError(
                f"{self.name}: held_out={self.held_out} leaves none of {windows} windows to train on; give more "
                "windows or hold out fewer"
            )

    def fit(self, phase: str, groups: list[dict[str, Any]], epochs: int, batch: int) -> FitResult:
        """Train ``groups`` for ``epochs`` at most, ``batch`` windows a step; nothing else gets gradients.

        Raises:
            StaysNonFiniteError: the loss stays non-finite, and no windows are held out that chose a state before.
        """
        self.block.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        device = next(self.block.parameters()).device
        objective = BlockObjective(
            f"{self.name} {phase}", self.block, self.data, self.weight.to(device), groups
        )
        kept = len(self.data.inputs) - self.held_out
        stop = None
        if self.held_out:
            trained = [parameter for group in groups for parameter in group["params"]]
            stop = EarlyStop(trained, lambda: self._held_out_loss(objective, batch), self.patience)
        loader = DataLoader(
            Windows(self.data, kept),
            batch_size=batch,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.seed),
        )
        try:
            result = fit(
                objective,
                loader,
                self.optimizer,
                epochs=epochs,
                precision=self.precision,
                loggers=self.loggers,
                callbacks=[stop] if stop else None,
            )
        except StaysNonFiniteError as error:
            if stop is None or not error.losses:
                raise
            logger.warning("%s; the phase ends here, in its best state on held-out windows", error)
            result = FitResult(error.losses, error.undone, max(1, len(error.losses) // len(loader)))
        if stop:
            stop.restore()
        gc.collect()  # the trainer and its moments refer to each other
        self.block.requires_grad_(False)
        return result

    @torch.no_grad()
    def _held_out_loss(self, objective: BlockObjective, batch: int) -> float:
        """Mean loss of the held-out windows, in the precision of the training."""
        pair = (self.data.inputs[-self.held_out :], self.data.targets[-self.held_out :])
        device = objective.weight.device

        def loss_of(part: tuple[Tensor, Tensor]) -> float:
            loss = objective(tuple(x.to(device) for x in part))
            forget(part)
            return float(loss) * len(part[0])

        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            losses = divided(loss_of, zip(*(x.split(batch) for x in pair), strict=True))
        return sum(losses) / self.held_out
