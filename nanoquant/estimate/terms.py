"""What memory is made of: terms with names, and the need of a phase, which is their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanoquant.mixture import SELF

ACTIVATIONS = "--run.activation_memory"


@dataclass(frozen=True)
class Use:
    """How the command runs, besides its configuration."""

    base: int
    """Bytes of the process with all libraries, before a model is loaded."""
    gpu: bool = False
    """Whether the model is on a GPU."""
    length: int | None = None
    """Tokens of a held-out window; None: no model is measured."""
    verify: bool = True
    """Whether the checkpoint is verified in a process of its own."""
    devices: int = 1
    """How many of them share the run, one a process."""
    text: Sequence[str] | str = ()
    """Calibration texts as the command names them, of which only "self" matters."""

    @property
    def writes(self) -> bool:
        """Whether the model writes one of the texts."""
        names = (self.text,) if isinstance(self.text, str) else self.text
        return any(name == SELF or name.startswith(f"{SELF}=") for name in names)


@dataclass(frozen=True)
class Term:
    """Something that takes memory."""

    name: str
    """What it is."""
    bytes: int
    """How much."""
    change: str = ""
    """Setting that makes it smaller; empty: none does."""
    host: bool = False
    """Whether it lies in main memory even where the model is on a GPU."""


@dataclass(frozen=True)
class Need:
    """What a phase takes at most."""

    phase: str
    """As run.json names it."""
    terms: tuple[Term, ...]
    """What it is made of."""
    gpu: bool = False
    """Whether the model is on a GPU."""

    def on(self, device: bool = False) -> list[Term]:
        """Terms in main memory, or on the GPU, largest first."""
        found = [t for t in self.terms if t.bytes and (self.gpu and not t.host) == device]
        return sorted(found, key=lambda term: -term.bytes)

    def bytes(self, device: bool = False) -> int:
        """In main memory, or on the GPU."""
        return sum(term.bytes for term in self.on(device))
