"""Amounts of bytes as texts, both ways."""

from __future__ import annotations

import math
import re

UNITS = {"B": 1} | {f"{p}B": 1000**n for n, p in enumerate("kMGT", 1)}
UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}


def parse_bytes(text: str, what: str = "memory") -> int:
    """Bytes of a text such as 8GB (10^9 each), 7.5GiB (2^30 each) or 8000MB.

    Args:
        text: a number with a unit; case does not matter.
        what: the setting that it comes from, for the message.

    Raises:
        ValueError: it is not a positive number with one of these units.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*", str(text))
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = units.get(found[2].lower()) if found else None
    number = math.nan if size is None else float(found[1]) * size
    value = int(number) if math.isfinite(number) else 0
    if value < 1:
        raise ValueError(
            f"{what} must be a number above 0 with a unit, {', '.join(UNITS)}, such as 8GB (10^9 bytes "
            f"each) or 7.5GiB (2^30 bytes each), got {str(text)!r}"
        )
    return value


def amount(size: int) -> str:
    """Bytes as a text: "6.74 GB", "63.4 MB", "46.1 kB"."""
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
