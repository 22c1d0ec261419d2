"""Which kernel a GPU runs, and how it is cut: a static table by architecture, tokens and shape.

``tiles.json`` holds it. Nothing is tuned during a call: an architecture that the table does not list takes the next
lower one, a number of tokens the next higher one, a shape the nearest one. Entries without a date were chosen by
instruction counts and not measured. ``nanoquant_kernels.tune`` measures tiles on
a GPU and writes them there.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class DotTile:
    """Tile of a product on tensor cores."""

    rows: int = 32
    """Rows of signs."""
    words: int = 64
    """16-bit words of a row; each holds 16 signs."""
    tokens: int = 16
    """Tokens; fewer are rounded up to 8 or 16."""
    warps: int = 2
    stages: int = 3
    """Loads in flight."""


@dataclass(frozen=True)
class FlipTile:
    """Tile of a product by sign flips."""

    rows: int = 16
    """Rows of signs."""
    warps: int = 2


KERNELS = {"dot": DotTile, "flip": FlipTile, "unpack": None}


@functools.cache
def table() -> dict:
    """The table as it is stored."""
    return json.loads(TABLE.read_text())


def write(table: dict, path: str | Path) -> None:
    """Store a table, one entry a line."""
    lists = (
        f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, table[name])) + "\n ]"
        for name in ("kernels", "tiles")
    )
    Path(path).write_text("{\n" + ",\n".join(lists) + "\n}\n")


@functools.cache
def kernel_for(architecture: int, tokens: int) -> str:
    """Name of the kernel for ``tokens`` tokens on an architecture such as 86 (compute capability 8.6)."""
    return _narrow(table()["kernels"], architecture, tokens)[0]["kernel"]


@functools.cache
def tile_for(
    architecture: int, kernel: str, tokens: int, rows: int, words: int
) -> DotTile | FlipTile | None:
    """Tile of a stage: ``rows`` rows of ``words`` 16-bit words of signs."""
    listed = [entry for entry in table()["tiles"] if entry["kernel"] == kernel]
    if not listed:
        return None
    near = min(
        _narrow(listed, architecture, tokens),
        key=lambda entry: (
            abs(math.log2(rows / entry["shape"][0])) + abs(math.log2(words / entry["shape"][1]))
        ),
    )
    return KERNELS[kernel](**near["tile"])


def _narrow(entries: list[dict], architecture: int, tokens: int) -> list[dict]:
    """Entries of the architecture at or below this one, and there of the token count at or above this one."""
    listed = sorted({entry["architecture"] for entry in entries})
    at = max((a for a in listed if a <= architecture), default=listed[0])
    entries = [entry for entry in entries if entry["architecture"] == at]
    counts = sorted({entry["tokens"] for entry in entries})
    count = min((c for c in counts if c >= tokens), default=counts[-1])
    return [entry for entry in entries if entry["tokens"] == count]
