"""JSON files that are whole at every moment."""

from __future__ import annotations

import json
import math
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


def finite(value: Any) -> Any:  # noqa: ANN401
    """The value with string keys and without NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
