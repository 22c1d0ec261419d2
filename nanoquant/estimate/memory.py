"""Most memory of every phase of ``nanoquant quantize``, as sums of terms that have names.

A term lies where the model is, in main memory or on a GPU, unless it is said to lie in main memory always. Weights that
stay in their files count as one block and what lies around the blocks, because a block that is done is let go of.
Shapes: N windows, T tokens a window, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from nanoquant.config import NanoQuantConfig
from nanoquant.estimate import work
from nanoquant.estimate.subject import Subject
from nanoquant.sizes import tensor_bytes

CUDA = 600 * 10**6
"""Bytes that CUDA and its libraries take on a GPU; assumed, nobody has measured it."""
COMPILER = 350 * 2**20
"""Bytes that compiling blocks adds to the process; measured with torch 2.13 on a CPU."""
SLACK = 0.05
"""Share of what a phase allocates that the heap keeps beyond it."""


@dataclass(frozen=True)
class Use:
    """How the command runs, besides its configuration."""

    base: int
    """Bytes of the process with all libraries, before a model is loaded."""
    gpu: bool = False
    """Whether the model is on a GPU."""
    length: int | None = None
    """Tokens of a held-out window; None: no model is measured."""


@dataclass(frozen=True)
class Term:
    """Something that takes memory."""

    name: str
    """What it is."""
    bytes: int
    """How much."""
    host: bool = False
    """Whether it lies in main memory even where the model is on a GPU."""
    change: str = ""
    """Setting that makes it smaller."""
    movable: bool = False
    """Whether ``run.activation_memory`` can put it on the disk."""


@dataclass(frozen=True)
class Need:
    """What a phase takes at most."""

    phase: str
    """As run.json names it."""
    terms: tuple[Term, ...]
    """What it is made of."""
    gpu: bool
    """Whether the model is on a GPU."""

    def bytes(self, device: bool = False) -> int:
        """In main memory, or on the GPU."""
        return sum(term.bytes for term in self.on(device))

    def on(self, device: bool = False) -> list[Term]:
        """Terms in main memory, or on the GPU."""
        return [t for t in self.terms if t.bytes and (self.gpu and not t.host) == device]
