"""JSON files that are whole at every moment, text of any origin, and plain values as dotted names and as flags."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoquant.commit import commit


def write_json(file: str | None, figures: dict[str, Any]) -> None:
    """Write figures to a file, whole or not at all; numbers that are not finite become null."""
    if file is None:
        return
    partial = Path(f"{file}.partial")
    try:
        partial.write_text(json.dumps(finite(figures), indent=2) + "\n", encoding="utf-8")
        commit(partial, Path(file))
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def parse_json(
    text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:  # noqa: ANN401
    """What JSON text says.

    Args:
        text: of any origin.
        pairs: makes an object of its names and values; None: a dictionary, of equal names the last.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(file: Path) -> str:
    """Text of a file of a folder; nothing is waited for where another kind of file is in its place.

    Raises:
        OSError: it can't be read, or is a pipe or a device.
        ValueError: it is no UTF-8.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise OSError(f"{file} is no regular file")
    return file.read_text(encoding="utf-8")


def finite(value: Any) -> Any:  # noqa: ANN401
    """The value with string keys and without NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names: {"a": {"b": 1}} gives {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def flag_text(value: Any) -> str:  # noqa: ANN401
    """A value as a flag takes it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
