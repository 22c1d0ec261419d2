"""The outcome of an ablation as a table: a row for every combination of choices, its seeds taken together."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoquant.ablation.plan import SEED

FORMS = {
    "bits": ".4f",
    "untrained": ".2f",
    "perplexity": ".2f",
    "excess": ".3f",
    "spread": ".3f",
    "change": "+.3f",
    "+-": ".3f",
    "error": ".4f",
    "divergence": ".4f",
    "seconds": ".0f",
    "seeds": "d",
}
COLUMNS = tuple(FORMS)


@dataclass(frozen=True)
class Row:
    """Means over the finished seeds of one combination; ``failed`` tells what went wrong in others.

    untrained: perplexity before the whole model trains; excess: mean of ln(perplexity) - ln(dense
    perplexity), in nats a token; spread: its standard deviation
    over seeds; change: mean over the seeds that both have of the excess minus that of the first row, and +- its
    standard error; error: weighted relative squared error of the weights after the last phase.
    """

    choices: dict[str, str]
    values: dict[str, float | None]
    failed: list[str]


def excess(record: dict[str, Any]) -> float:
    """Loss above the dense model's, in nats a token."""
    return math.log(record["perplexity"]) - math.log(record["dense_perplexity"])


def rows(records: list[dict[str, Any]]) -> list[Row]:
    """Rows in the order of the cells."""
    groups: dict[tuple[tuple[str, str], ...], list[dict[str, Any]]] = {}
    for record in records:
        choices = tuple(item for item in record["choices"].items() if item[0] != SEED)
        groups.setdefault(choices, []).append(record)
    first = _by_seed(next(iter(groups.values()), []))
    return [_row(dict(choices), members, first) for choices, members in groups.items()]


def _by_seed(records: list[dict[str, Any]]) -> dict[str | None, float]:
    """Excess of the finished cells by seed."""
    finished = [record for record in records if record["status"] == "finished"]
    return {record["choices"].get(SEED): excess(record) for record in finished}


def _row(
    choices: dict[str, str], records: list[dict[str, Any]], first: dict[str | None, float]
) -> Row:
    done = [record for record in records if record["status"] == "finished"]
    failed = [record["error"] for record in records if record["status"] != "finished"]
    values: dict[str, float | None] = dict.fromkeys(COLUMNS)
    if done:
        by_seed = _by_seed(records)
        above = list(by_seed.values())
        changes = [by_seed[seed] - first[seed] for seed in by_seed if seed in first]
        values = {
            "bits": _mean([record["bits"] for record in done]),
            "untrained": _middle([record.get("untrained_perplexity") for record in done]),
            "perplexity": _middle([record["perplexity"] for record in done]),
            "excess": _mean(above),
            "spread": statistics.stdev(above) if len(above) > 1 else None,
            "change": math.fsum(changes) / len(changes) if changes else None,
            "+-": statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else None,
            "error": _mean([list(record["errors"].values())[-1] for record in done]),
            "divergence": _mean([record["divergence"] for record in done]),
            "seconds": _mean([record["seconds"] for record in done]),
        }
    return Row(choices, values | {"seeds": len(done)}, failed)


def _mean(values: list[float | None]) -> float | None:
    """The mean; None where any is missing."""
    return None if None in values else math.fsum(values) / len(values)


def _middle(values: list[float | None]) -> float | None:
    """The geometric mean; None where any is missing."""
    return None if None in values else math.exp(_mean([math.log(value) for value in values]))


def markdown(found: list[Row]) -> str:
    """The rows as a Markdown table, failures under it."""
    axes = list(found[0].choices)
    lines = ["| " + " | ".join([*axes, *COLUMNS]) + " |", "|" + "---|" * (len(axes) + len(COLUMNS))]
    notes = []
    for row in found:
        cells = [row.choices[axis] for axis in axes]
        cells += [
            "" if row.values[name] is None else format(row.values[name], FORMS[name])
            for name in COLUMNS
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        where = ", ".join(f"{axis} {label}" for axis, label in row.choices.items())
        notes += [f"- failed: {where}: {' '.join(error.split())}" for error in row.failed]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def write_csv(file: Path, records: list[dict[str, Any]]) -> None:
    """Every cell as a line: choices, figures, and the error of one that failed."""
    axes = list(records[0]["choices"])
    figures = [
        "perplexity",
        "untrained_perplexity",
        "dense_perplexity",
        "bits",
        "mean_rank",
        "divergence",
        "seconds",
    ]
    phases = ["initialize", "block", "model"]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        header = [*axes, "status", *figures, *(f"{phase}_error" for phase in phases), "failure"]
        writer.writerow(header)
        for record in records:
            errors = record.get("errors", {})
            writer.writerow(
                [
                    *(record["choices"][axis] for axis in axes),
                    record["status"],
                    *(record.get(name) for name in figures),
                    *(errors.get(phase) for phase in phases),
                    record["error"],
                ]
            )
