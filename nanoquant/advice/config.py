"""What is asked of the advisor: memory, context, task, device."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

from nanoquant.units import parse_bytes

STRICT = ("math", "code", "long-context")
"""Tasks that suffer first when bits are taken away."""
TASKS = ("chat", *STRICT)
DEVICES = ("auto", "cpu", "cuda", "gpu")
USUAL_CONTEXT = 4096


@dataclass(frozen=True)
class Use:
    """How a model is going to run."""

    context: int
    """Tokens of prompt and answer together."""
    batch: int
    """Texts at once."""
    device: str
    """Where it runs, "cpu" or "cuda"."""
    cache_bits: int
    """Bits of a number of the cache."""


@dataclass(frozen=True, kw_only=True)
class AdviceConfig:
    """Where and for what a model is going to run."""

    memory: str | None = None
    """Memory of the device, such as 8GB (10^9 bytes each) or 7.5GiB (2^30 bytes each); null asks this machine."""
    context: int | None = None
    """Tokens of prompt and answer together; null takes 4096, or the model's positions where they are fewer."""
    batch: int = 1
    """Texts at once."""
    task: str = "chat"
    """What it is for: chat, math, code or long-context."""
    device: str = "auto"
    """Where it runs: auto, cpu or cuda; auto takes a GPU if this machine has one."""
    cache_bits: int = 16
    """Bits of a number of the key-value cache: 16, 8 or 4."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task.lower(), TASKS, n=1, cutoff=0.3)
            meant = f" (near: {near[0]})" if near else ""
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}{meant}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.cache_bits not in (16, 8, 4):
            raise ValueError(f"cache_bits must be 16, 8 or 4, got {self.cache_bits}")
        for name in ("batch", "context"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.memory is not None:
            parse_bytes(self.memory)

    def use(self, positions: int | None, name: str) -> Use:
        """The use of a model with so many positions.

        Raises:
            ValueError: the context goes beyond them.
        """
        context = self.context or min(USUAL_CONTEXT, positions or USUAL_CONTEXT)
        if positions is not None and context > positions:
            raise ValueError(
                f"context {context} goes beyond the {positions} positions of {name}; ask for at most "
                f"{positions}, or for a model made for longer texts"
            )
        return Use(context, self.batch, device_kind(self.device), self.cache_bits)

    def bytes(self) -> int:
        """Bytes of the memory that is asked about.

        Raises:
            ValueError: none is named, and this machine can't be asked.
        """
        kind = device_kind(self.device)
        return memory_of(kind) if self.memory is None else parse_bytes(self.memory)


def device_kind(device: str) -> str:
    """The kind of device, "cpu" or "cuda"; it need not be in this machine unless auto looks for it."""
    if device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else "cuda"


def memory_of(device: str) -> int:
    """Bytes of memory of this machine: of its GPU, or its main memory.

    Raises:
        ValueError: a GPU is asked for and there is none, or the system does not tell.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("this machine has no GPU to ask; say --memory, such as --memory 8GB")
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        raise ValueError("this system does not tell its memory; say --memory 8GB") from None
