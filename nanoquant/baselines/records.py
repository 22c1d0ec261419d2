"""What a table and a plot show of records that ``nanoquant evaluate --json`` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoquant.evaluation.compare import check_settings, read_record

OURS = ("dense", "nanoquant")
"""Methods whose records are told apart by the name of the model."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, and one point of the plot."""

    name: str
    body_bits: float | None
    """Bits per weight of the decoder's linears; None for a dense model, which has no quantized ones."""
    model_bits: float
    """Bits per parameter of the whole model."""
    bytes: int
    """Bytes of all tensors that are stored."""
    perplexity: dict[str, float]
    """By protocol, where it was measured and is finite."""
    kl: dict[str, float]
    """Nats a token from the dense model, by protocol."""
    accuracy: dict[str, Any] | None
    """Mean over the zero-shot tasks with its standard error ("acc", "acc_stderr"), 0 to 1."""


def read_comparable(files: Sequence[str]) -> list[dict[str, Any]]:
    """Read records and make sure that each protocol was measured in one way.

    Raises:
        ValueError: a file is no record, or two records measured a protocol differently; says how.
    """
    records = [read_record(file) for file in files]
    first: dict[str, int] = {}
    for index, record in enumerate(records):
        for name in record["protocols"]:
            other = first.setdefault(name, index)
            check_settings((files[other], files[index]), (records[other], record), name)
    return records


def row_of(record: dict[str, Any]) -> Row:
    """What to show of a record."""
    results, bits, method = record["results"], record["bits"], record["method"]
    return Row(
        name=f"{method} {Path(record['model']).name}" if method in OURS else method,
        body_bits=bits["body_bits_per_weight"],
        model_bits=bits["model_bits_per_parameter"],
        bytes=bits["bytes_on_disk"],
        perplexity=_figures(results, "perplexity"),
        kl=_figures(results, "kl"),
        accuracy=record["zero_shot_mean"]["model"],
    )


def rows_of(records: Sequence[dict[str, Any]]) -> list[Row]:
    """What to show of records; where two would have one name, the whole name of the model tells them apart."""
    rows = [row_of(record) for record in records]
    times = Counter(row.name for row in rows)
    return [
        replace(row, name=f"{record['method']} {record['model']}") if times[row.name] > 1 else row
        for row, record in zip(rows, records, strict=True)
    ]


def _figures(results: dict[str, Any], key: str) -> dict[str, float]:
    """A figure by protocol, where there is one."""
    return {name: figures[key] for name, figures in results.items() if figures.get(key) is not None}
