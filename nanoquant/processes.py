"""Several processes of one run, one a device, as torchrun or SLURM starts them; a single one is world size 1.

All of them call the same functions in the same order, as torch.distributed wants it. The first one, rank 0, alone
writes files and talks; the others read files after it, so they must be on a file system that all share. Without a
launcher nothing here starts, waits or sends.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

T = TypeVar("T")

SECONDS_TO_TELL = 10.0
"""Longest wait for the others when a process ends with an error."""


def launcher() -> ClusterEnvironment | None:
    """Lightning's view of what started this process as one of several: torchrun or SLURM's srun; else None.

    Raises:
        ValueError: SLURM was not told the processes of a machine.
    """
    if not dist.is_available():
        return None
    if not dist.is_torchelastic_launched() and "SLURM_NTASKS" not in os.environ:
        return None  # spares Lightning's import
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    except RuntimeError as error:
        raise ValueError(f"SLURM: {error}") from None


def join(device: str, timeout: float) -> None:
    """Meet the other processes of this run, where there are any; a process group that exists is taken as it is.

    Args:
        device: type of the device that this process works on: a GPU becomes the one of its number on this machine.
        timeout: seconds that a process waits for the others, here and later.

    Raises:
        ValueError: this machine has fewer GPUs than processes, the others do not come, or the group was started
            in another way.
    """
    found = launcher()
    if found is None or found.world_size() == 1 or _started():
        if found is None and world_size() > 1:
            raise ValueError(
                "torch.distributed runs in this process, but neither torchrun nor SLURM has started it; use torchrun"
            )
        return
    if device == "cuda":
        if found.local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"process {found.global_rank()} is number {found.local_rank()} on its machine, where torch finds "
                f"{torch.cuda.device_count()} GPUs; start one process a GPU"
            )
        torch.cuda.set_device(found.local_rank())
    os.environ["MASTER_ADDR"] = found.main_address
    os.environ["MASTER_PORT"] = str(found.main_port)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            rank=found.global_rank(),
            world_size=found.world_size(),
            timeout=timedelta(seconds=timeout),
        )
    except dist.DistError as error:
        raise ValueError(
            f"{found.world_size()} processes were to meet at {found.main_address}:{found.main_port}, but did not in "
            f"{timeout:g} s; start all of them, by torchrun or srun ({error})"
        ) from error


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if _started() else 0


def first() -> bool:
    """Whether this process is the one that writes and talks."""
    return rank() == 0


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists each once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, value: object) -> tuple[int, torch.Size, torch.dtype, str] | None:
        if not isinstance(value, Tensor):
            return None
        number, _ = self.tensors.setdefault(id(value), (len(self.tensors), value))
        return number, value.shape, value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Puts empty tensors in their places, and lists them in the same order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_load(self, about: tuple[int, torch.Size, torch.dtype, str]) -> Tensor:
        number, shape, dtype, device = about
        empty = torch.empty(shape, dtype=dtype, device=device)
        return self.tensors.setdefault(number, (number, empty))[1]


def broadcast(value: T, source: int = 0) -> T:
    """The value of one process on all, tensors inside on the same type of device; what the others give is ignored."""
    if world_size() == 1:
        return value
    sent: list[bytes | None] = [None]
    if rank() == source:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        sent = [file.getvalue()]
    dist.broadcast_object_list(sent, source)
    if rank() != source:
        pickler = _Unpickler(io.BytesIO(sent[0]))
        value = pickler.load()
    for _, tensor in pickler.tensors.values():
        if tensor.numel():  # as bytes, since gloo does not know every dtype
            dist.broadcast(tensor.detach().contiguous().flatten().view(torch.uint8), source)
    return value


def gather(value: T) -> list[T]:
    """The values of all processes by rank, on each."""
    return [broadcast(value, source) for source in range(world_size())]


def on_first(work: Callable[[], T]) -> T:
    """What ``work`` gives to the first process, on all; an error there is raised on all."""
    if world_size() == 1:
        return work()
    value, error = None, None
    if first():
        try:
            value = work()
        except Exception as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def divided(
    work: Callable[[Any], T], items: Iterable[Any], idle: Callable[[], object] | None = None
) -> list[T]:
    """Results of ``work`` on each item, in order, on all processes; each does every n-th, and holds one at a time.

    Args:
        work: what a process does with an item.
        items: the same on all.
        idle: what a process does in the last turn, where others still have an item and it has none.
    """
    count, own, items_seen = world_size(), [], 0
    for n, item in enumerate(items):
        items_seen = n + 1
        if n % count == rank():
            own.append(work(item))
    if idle is not None and 0 < items_seen % count <= rank():
        idle()
    shares = gather(own)
    return [shares[n % count][n // count] for n in range(items_seen)]


def lost(error: BaseException) -> bool:
    """Whether an error means that another process is gone or does not answer."""
    if world_size() == 1:
        return False
    words = ("gloo", "Connection closed by peer", "NCCL")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, dist.DistError)


def tells(message: str, unless_told: bool = False) -> bool:
    """Whether it is for this process to say how the run ends: no other has said the same.

    Args:
        message: what it would say.
        unless_told: another one's message says more, whatever it is.
    """
    if not _started():
        try:
            found = launcher()
        except ValueError:
            return True
        return found is None or found.global_rank() == 0
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set_timeout(timedelta(seconds=SECONDS_TO_TELL))
        if unless_told and store.add("told", 0):
            return False
        store.add("told", 1)
        return store.add(hashlib.sha256(message.encode()).hexdigest(), 1) == 1
    except RuntimeError:  # the process that held the store is gone
        return True
