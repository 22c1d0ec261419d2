"""Decoder blocks that stay in main memory, or in their files, and visit the device that computes one at a time.

A model larger than the memory of a GPU is calibrated and made binary there in the memory of one block. What lies
around the blocks, embedding, norm and head, is on the device all the time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nanoquant.mapped import forget

Module = TypeVar("Module", bound=nn.Module)
VISIT = "offload_visit"
"""Attribute of a block that visits."""


@dataclass
class Visit:
    """A block's visits to a device."""

    device: torch.device
    depth: int = 0
    """How many wait for the end of the present visit."""
    homes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By id: each tensor on the device, and the one at home."""


def offload(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Put a model on a device, all but its blocks, which go there while their forward runs.

    A copy of the model (``copy.deepcopy``) does the same. Gradients need a visit that lasts until the backward pass
    has ended, see :func:`at_work`. :func:`settle` undoes it.

    Args:
        model: on the CPU; its weights may be mapped.
        blocks: of the model, which share no parameter.
        device: where it computes.

    Raises:
        ValueError: a block visits already, or something else has replaced its forward.
    """
    guests = list(blocks)
    for number, block in enumerate(guests):
        if "forward" in vars(block):
            raise ValueError(
                f"block {number} has a forward of its own, as hooks of other libraries give it, or visits already; "
                "remove them, or offload once"
            )
    inside = {module for block in guests for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for block in guests:
        setattr(block, VISIT, Visit(device))
        block.forward = functools.partial(_visiting, block)  # a copy of the block calls the copy


def settle(model: Module) -> Module:
    """Put all blocks of a model, or one block, where they visited until now; they stay there."""
    for block in [module for module in model.modules() if visits(module)]:
        device = getattr(block, VISIT).device
        delattr(block, VISIT)
        del block.forward
        block.to(device)
    return model


def visits(module: nn.Module) -> bool:
    """Whether a module is a block that visits a device."""
    return VISIT in vars(module)


@contextlib.contextmanager
def at_work(block: nn.Module, changes: bool = False) -> Iterator[None]:
    """While active, a block that visits a device is there; others are where they are.

    Args:
        block: any.
        changes: whether what the block has on the device then comes home; else it is what it was, but for new tensors,
            and whatever was written is lost.
    """
    if not visits(block):
        yield
        return
    visit = getattr(block, VISIT)
    visit.depth += 1
    try:
        if visit.depth == 1:
            _arrive(block, visit)
        yield
    finally:
        visit.depth -= 1
        if not visit.depth:
            _leave(block, visit, changes)


def _visiting(block: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """The forward of a block, on a visit."""
    with at_work(block):
        return type(block).forward(block, *args, **kwargs)


def _stores(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where each parameter and buffer of a block is held, under which name, and it itself."""
    for module in block.modules():
        for store in (module._parameters, module._buffers):
            yield from ((store, name, t) for name, t in list(store.items()) if t is not None)


def _arrive(block: nn.Module, visit: Visit) -> None:
    """Copy a block to the device; pages of its files are given back."""
    for store, name, home in _stores(block):
        away = _like(home, home.data.to(visit.device, copy=True))
        visit.homes[id(away)] = (away, home)
        store[name] = away
        forget([home])


def _leave(block: nn.Module, visit: Visit, changes: bool) -> None:
    """Put back what a block was; what is new, and with ``changes`` all, goes to the CPU."""
    for store, name, away in _stores(block):
        _, home = visit.homes.get(id(away), (None, None))
        if home is None:  # new, or it never came
            new = away.device.type != "cpu"
            store[name] = _like(away, away.data.to("cpu")) if new else away
            continue
        if changes:
            home.data = away.data.to("cpu")
        store[name] = home
    visit.homes.clear()


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """A parameter or buffer of other values."""
    if not isinstance(tensor, nn.Parameter):
        return values
    return nn.Parameter(values, requires_grad=tensor.requires_grad)
