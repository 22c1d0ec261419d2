"""Where values stop being finite: the layer that a message names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.compiling import uncompiled
from nanoquant.mapped import forget
from nanoquant.shards import whole

AT_ONCE = 1 << 24
"""Values that are looked at together."""


class StaysNonFiniteError(FloatingPointError):
    """A training that was given up.

    Args:
        message: what is not finite, where, and what to do.
        undone: steps that were undone, the last one counted.
        losses: of the steps before.
    """

    def __init__(self, message: str, undone: int, losses: list[float]) -> None:
        super().__init__(message)
        self.undone, self.losses = undone, losses


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors that hold a value that is not finite; mapped ones give their memory back."""
    return [
        name
        for name, tensor in tensors
        if tensor.is_floating_point() and not tensor.is_meta and not _finite_in_parts(tensor)
    ]


def _finite_in_parts(tensor: Tensor) -> bool:
    parts = tensor.detach().flatten().split(AT_ONCE)
    try:
        return all(bool(part.isfinite().all()) for part in parts)
    finally:
        forget([tensor])


@torch.no_grad()
def first_non_finite(objective: nn.Module, batch: Any) -> str:  # noqa: ANN401
    """Name of a parameter that is not finite, else of the first module whose output is not."""
    found = [name for name, p in objective.named_parameters() if not all_finite(p)]
    if found:
        return found[0]

    def watch(name: str, output: object) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: watch(name, output))
        for name, module in objective.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        with uncompiled():
            objective(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"


def locate_non_finite(objective: nn.Module, batch: Sequence[Tensor], precision: str) -> str:
    """The same of a batch that may lie elsewhere, in a Lightning precision."""
    device = next(objective.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        return first_non_finite(objective, [tensor.to(device) for tensor in batch])


def has_bad_gradient(parameter: nn.Parameter) -> bool:
    """Whether a parameter has a gradient that is not finite."""
    return parameter.grad is not None and not all_finite(parameter.grad)


def all_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, those of other processes' shards too."""
    return bool(whole(tensor.detach()).isfinite().all())
