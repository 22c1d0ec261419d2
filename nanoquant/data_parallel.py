"""Lightning's data parallel training over the processes of a run: each has its part of every batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from nanoquant.processes import gather, launcher, rank, world_size


def check_batch(name: str, batch: int) -> None:
    """Refuse a batch in which some processes would have nothing to do.

    Args:
        name: of the setting.
        batch: windows a step.

    Raises:
        ValueError: says what is allowed.
    """
    if batch < world_size():
        raise ValueError(
            f"{name}={batch} can't be divided over {world_size()} processes; take {world_size()} or a multiple of it, "
            "or start fewer processes"
        )


class Part:
    """The part of one process of each batch, in the order of the whole batches; it may be empty.

    Args:
        batches: numbers of the samples of each batch.
        rank: of the process.
        count: of the processes.
    """

    def __init__(self, batches: Iterable[list[int]], rank: int, count: int) -> None:
        self.batches, self.rank, self.count = batches, rank, count

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            begin, end = (len(batch) * k // self.count for k in (self.rank, self.rank + 1))
            yield batch[begin:end]


def part_of(loader: DataLoader) -> DataLoader:
    """The loader of this process's part of each batch, [] where it is empty; of one process the loader itself."""
    if world_size() == 1:
        return loader
    return DataLoader(
        loader.dataset,
        batch_sampler=Part(loader.batch_sampler, rank(), world_size()),
        collate_fn=lambda rows: loader.collate_fn(rows) if rows else [],
        generator=loader.generator,
    )


def placement(device: torch.device, sharded: bool = False) -> dict[str, Any]:
    """Arguments of Lightning's Trainer: the device, or with several processes those of this machine.

    Args:
        device: where the objective is.
        sharded: whether its parameters are shards.
    """
    accelerator = "gpu" if device.type == "cuda" else device.type
    if world_size() == 1:
        devices = 1 if device.index is None else [device.index]
        return {"accelerator": accelerator, "devices": devices}
    found = launcher()
    local = 1 + max(gather(found.local_rank()))
    if sharded:
        strategy = ModelParallelStrategy(data_parallel_size=world_size(), tensor_parallel_size=1)
    else:
        strategy = DDPStrategy(
            init_sync=False,  # all have the same state, and most of it is frozen
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    return {
        "accelerator": accelerator,
        "devices": local,
        "num_nodes": world_size() // local,
        "strategy": strategy,
        "plugins": [found],
        "use_distributed_sampler": False,
    }


def mean(value: float, weight: int) -> tuple[float, float]:
    """Mean over processes of values by weight, and the factor that makes a plain mean of gradients the same one.

    Args:
        value: of this process; any with weight 0.
        weight: samples that it is the mean of.
    """
    if world_size() == 1:
        return value, 1.0
    sums = torch.tensor([value * weight if weight else 0.0, weight], dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1]), float(weight * world_size() / sums[1])
