"""Where a training goes on: steps done, moments of the optimizer, and an order of windows that can begin anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Where a run goes on: steps done, how many of them undone, and the optimizer's moments by number and name."""

    step: int = 0
    undone: int = 0
    moments: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class Order:
    """Numbers of the windows of each step, over all epochs; a run may go on at any step.

    Args:
        windows: how many there are.
        batch: windows a step; the last of an epoch may have fewer.
        epochs: each has an order of its own.
        seed: of the orders.
    """

    def __init__(self, windows: int, batch: int, epochs: int, seed: int) -> None:
        self.windows, self.batch, self.epochs, self.seed, self.start = (
            windows,
            batch,
            epochs,
            seed,
            0,
        )

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * -(-self.windows // self.batch)

    def __len__(self) -> int:
        """Steps that are left."""
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        batches = (
            batch.tolist()
            for _ in range(self.epochs)
            for batch in self._shuffled(generator).split(self.batch)
        )
        return itertools.islice(batches, self.start, None)

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """All windows in the order that torch's loader gives where batches are whole, so that earlier runs repeat."""
        torch.empty((), dtype=torch.int64).random_(
            generator=generator
        )  # the loader's seed of its workers
        return torch.randperm(self.windows, generator=generator)


MOMENT = "moment"


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer, named after the number of the parameter."""
    return {
        f"{MOMENT}.{number}.{name}": tensor
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def read_moments(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The same, from tensors among which they are, for :class:`Start`."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == MOMENT:
            number, _, name = rest.partition(".")
            found.setdefault(int(number), {})[name] = tensor
    return found
