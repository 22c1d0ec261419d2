"""Paired comparison of records: the same windows and questions, differences with 95% confidence intervals.

The interval is that of the paired t test: mean of the differences d_i, plus or minus the 97.5% quantile of Student's
t with n - 1 degrees of freedom times std(d) / sqrt(n). Windows of perplexity, KL and agreement, and questions of
tasks, are the units. Neighbouring windows of one document are somewhat alike, which the interval does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoquant.console import table
from nanoquant.evaluation.record import FORMAT
from nanoquant.evaluation.tasks import TASKS
from nanoquant.json_files import parse_json

LEVEL = 0.95
LISTS = {
    "per_window": "nats per token",
    "per_window_kl": "KL from dense",
    "per_window_top1": "same first choice as dense",
    "per_question": "acc",
    "per_question_norm": "acc_norm",
}
"""Lists of a result that are paired, and what they are called."""
FREE = {"source", "data", "batch"}
"""Settings that may differ: digests say whether the windows and questions are the same."""


def read_record(file: str) -> dict[str, Any]:
    """A record that ``nanoquant evaluate --json`` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        record = parse_json(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as a record: {error}") from None
    if not isinstance(record, dict) or not {"protocols", "results", "tokenizer"} <= record.keys():
        several = isinstance(record, dict) and "records" in record
        raise ValueError(
            f"{file} holds several records; give single ones, as --baselines leaves them in the folder --out"
            if several
            else f"{file} is no record; nanoquant evaluate MODEL --json FILE writes one"
        )
    if record.get("format") != FORMAT:
        raise ValueError(f"{file} has format {record.get('format')!r}; this version reads {FORMAT}")
    return record


def compare(names: Sequence[str], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Differences of every record from the first one.

    Args:
        names: of the records, for messages and the table.
        records: two or more.

    Returns:
        "first", "method", "level" and "differences": one entry for each other record and figure, with its name,
        protocol, figure, mean, low, high, standard error, number of pairs and, for perplexities, their ratio.

    Raises:
        ValueError: other tokenizers, other settings of a protocol, or nothing in common; says which.
    """
    if len(records) < 2:
        raise ValueError(f"a comparison needs two records or models, got {len(records)}")
    first, *others = records
    differences = []
    for name, other in zip(names[1:], others, strict=True):
        common = check_comparable((names[0], name), (first, other))
        found = [
            {"model": name, **entry}
            for key in common
            for entry in _differences(key, first["results"][key], other["results"][key])
        ]
        differences += found + _mean_over_tasks(name, found)
    return {
        "first": names[0],
        "models": list(names),
        "method": "paired t",
        "level": LEVEL,
        "left_out": _left_out(names, records),
        "differences": differences,
    }


def check_comparable(
    names: tuple[str, str], records: tuple[dict[str, Any], dict[str, Any]]
) -> list[str]:
    """Names of the protocols of two records; of these only "protocols" and "tokenizer" are looked at.

    Raises:
        ValueError: other tokenizers, other settings of a protocol, or nothing in common; says which.
    """
    one, two = (record["protocols"] for record in records)
    common = [key for key in one if key in two]
    if not common:
        raise ValueError(
            f"{names[0]} and {names[1]} have no protocol in common: {', '.join(one)} and {', '.join(two)}"
        )
    for key in common:
        check_settings(names, records, key)
    return common


def compare_table(found: dict[str, Any]) -> str:
    """The comparison as text; an interval that excludes 0 is marked."""
    header = [f"minus {found['first']}", "difference", "95% interval", "pairs"]
    rows = []
    for entry in found["differences"]:
        label = f"{entry['model']}: {entry['protocol']}, {entry['figure']}"
        marked = " *" if entry["low"] > 0 or entry["high"] < 0 else "  "
        interval = f"{entry['low']:+.4f} to {entry['high']:+.4f}{marked}"
        rows.append([label, f"{entry['mean']:+.4f}", interval, f"{entry['pairs']:,}"])
        if "ratio" in entry:
            low, high = (math.exp(entry[end]) for end in ("low", "high"))
            label = f"{entry['model']}: {entry['protocol']}, perplexity, ratio"
            rows.append([label, f"{entry['ratio']:.4f}", f"{low:.4f} to {high:.4f}{marked}", ""])
    legend = "* an interval without 0, or a ratio without 1; paired t over windows and questions"
    return f"{table(rows, header=header)}\n{legend}"


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean of second - first, and half width and standard error of its 95% interval by the paired t test.

    Raises:
        ValueError: the lists differ in length or hold fewer than two pairs.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"pairs need two equal lists of 2 or more, got {len(first)} and {len(second)}"
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    error = math.sqrt(variance / n)
    return mean, t_quantile(n - 1) * error, error


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(|T| <= t) = level for Student's distribution, by bisection."""
    low, high = 0.0, 2.0
    while _t_probability(high, degrees) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, degrees) < level else (low, middle)
    return high


def _t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) by the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _differences(name: str, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each list that both results have."""
    entries = []
    for key, figure in LISTS.items():
        if key not in first or key not in second:
            continue
        mean, half, error = paired_interval(first[key], second[key])
        entry = {"protocol": name, "figure": figure, "pairs": len(first[key])}
        entry |= {"mean": mean, "low": mean - half, "high": mean + half, "stderr": error}
        entries.append(entry | ({"ratio": math.exp(mean)} if key == "per_window" else {}))
    return entries


def _mean_over_tasks(name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean of acc over two or more tasks; degrees of freedom by Welch and Satterthwaite."""
    tasks = [entry for entry in found if entry["protocol"] in TASKS and entry["figure"] == "acc"]
    if len(tasks) < 2:
        return []
    mean = math.fsum(entry["mean"] for entry in tasks) / len(tasks)
    variances = [entry["stderr"] ** 2 for entry in tasks]
    error = math.sqrt(math.fsum(variances)) / len(tasks)
    spread = math.fsum(
        v**2 / (entry["pairs"] - 1) for v, entry in zip(variances, tasks, strict=True)
    )
    degrees = int(math.fsum(variances) ** 2 / spread) if spread else 1
    half = t_quantile(degrees) * error
    entry = {"model": name, "protocol": f"mean of {len(tasks)} tasks", "figure": "acc"}
    entry |= {"pairs": sum(entry["pairs"] for entry in tasks), "mean": mean}
    return [entry | {"low": mean - half, "high": mean + half, "stderr": error}]


def check_settings(
    names: tuple[str, str], records: tuple[dict[str, Any], dict[str, Any]], key: str
) -> None:
    """Refuse results of one protocol per token of different tokens, or under other settings."""
    if key not in TASKS:  # answers to questions may be compared all the same
        _check_tokenizers(names, records, key)
    one, two = (record["protocols"][key] for record in records)
    differing = [
        f"{name} {one.get(name)!r} and {two.get(name)!r}"
        for name in sorted((one.keys() | two.keys()) - FREE)
        if one.get(name) != two.get(name)
    ]
    if differing:
        sources = [str(settings.get("source")) for settings in (one, two)]
        texts = f" ({sources[0]} and {sources[1]})" if sources[0] != sources[1] else ""
        raise ValueError(
            f"{names[0]} and {names[1]} were measured by another {key}{texts}: {'; '.join(differing)}; "
            "evaluate one of them again with the settings of the other"
        )


def _check_tokenizers(
    names: tuple[str, str], records: tuple[dict[str, Any], dict[str, Any]], key: str
) -> None:
    one, two = (record["tokenizer"] for record in records)
    if one["sha256"] != two["sha256"]:
        raise ValueError(
            f"{names[0]} and {names[1]} have other tokenizers ({one['class']} of {one['tokens']:,} tokens, "
            f"{two['class']} of {two['tokens']:,}), so {key} can't be compared per token; "
            "zero-shot tasks can: evaluate both with --zero-shot alone"
        )


def _left_out(names: Sequence[str], records: Sequence[dict[str, Any]]) -> list[str]:
    """What only some records have, in words."""
    everything = list(dict.fromkeys(key for record in records for key in record["results"]))
    return [
        f"{name} has no {key}"
        for key in everything
        for name, record in zip(names, records, strict=True)
        if key not in record["results"]
    ]
