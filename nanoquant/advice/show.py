"""The advice as text, and as plain values for JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from nanoquant.advice.published import Figure, Source
from nanoquant.advice.recommend import Advice, Choice
from nanoquant.advice.rows import Row
from nanoquant.console import table
from nanoquant.units import amount

WIDTH = 110
SMALL = 2e9
"""Memory in bytes below which tables are in MB."""
METRICS = ("perplexity", "zero-shot")
HEADER = ("option", "weights", "cache", "activations", "total", "fits", *METRICS)


def report(advice: Advice) -> str:
    """Table, sources, rules, recommendation, reasons and commands."""
    sources: list[Source] = []
    unit, digits = (1e9, 3) if advice.memory >= SMALL else (1e6, 1)
    main = {metric: advice.table.main_protocol(metric) for metric in METRICS}
    rows = [
        [
            row.option.name,
            *(f"{size / unit:.{digits}f}" for size in _sizes(row)),
            row.fits,
            *(_quality(row.figure(metric), main[metric], sources) for metric in METRICS),
        ]
        for row in advice.table.rows
    ]
    use, model = advice.use, advice.table.model
    known = advice.named.published
    lines = [
        f"{advice.named.name}: {model.parameters:,} parameters"
        + (f", shapes of {known}" if known not in (None, advice.named.name) else ""),
        f"{advice.task} in {amount(advice.memory)} on {use.device}: context {use.context}, "
        f"batch {use.batch}, cache of {use.cache_bits} bits",
        "",
        table(rows, header=HEADER),
        "",
        *_wrapped(
            f"Sizes in {'GB of 10^9' if unit == 1e9 else 'MB of 10^6'} bytes. Weights: the stored "
            "tensors, exactly. Cache: at full context. Activations: an estimate for reading the "
            "whole context at once. tight: less than a tenth is left over. unknown: no figure is in "
            "the table of this command, which does not mean that there is none. *: of another "
            "protocol than most of its column, so it does not compare with them."
        ),
        *(line for why in advice.table.impossible for line in _wrapped(f"not possible: {why}")),
        *(line for n, source in enumerate(sources, 1) for line in _wrapped(_cited(n, source))),
        "",
        "Rules that apply",
        *(
            line
            for rule in advice.rules
            for line in _wrapped(f"- {rule.name}: {rule.text} [{rule.source}]")
        ),
        "",
        *_recommendation(advice),
    ]
    return "\n".join(lines)


def to_dict(advice: Advice) -> dict[str, Any]:
    """Plain values by name."""
    model = advice.table.model
    return {
        "format": 1,
        "model": advice.named.name,
        "published": advice.named.published,
        "post_trained": advice.named.post_trained,
        "parameters": model.parameters,
        "task": advice.task,
        **asdict(advice.use),
        "memory": advice.memory,
        "options": [_plain(row) for row in advice.table.rows],
        "impossible": list(advice.table.impossible),
        "rules": [asdict(rule) for rule in advice.rules],
        "recommended": _plain_choice(advice.recommended),
        "model_itself": _plain_choice(advice.itself),
        "reasons": advice.reasons,
    }


def _recommendation(advice: Advice) -> list[str]:
    """What to do, why, and the commands."""
    chosen, itself = advice.recommended, advice.itself
    if chosen is None:
        lines = ["Recommended: nothing that fits"]
    else:
        lines = [f"Recommended: {chosen.row.model} as {chosen.row.option.name}"]
    lines += [line for reason in advice.reasons for line in _wrapped(f"- {reason}")]
    if chosen is not None:
        lines += ["", chosen.command]
    if itself is not None and itself != chosen:
        lines += ["", f"If it has to be {itself.row.model}: {itself.row.option.name}"]
        lines += ["", itself.command]
    return lines


def _sizes(row: Row) -> tuple[int, ...]:
    """Bytes of weights, cache, activations and all."""
    cost = row.cost
    return cost.weights, cost.cache, cost.activations, cost.total


def _quality(figure: Figure | None, main: str | None, sources: list[Source]) -> str:
    """A figure with who says so and the number of its source; a star where it does not compare with the others."""
    if figure is None:
        return "unknown"
    if figure.source not in sources:
        sources.append(figure.source)
    star = "" if figure.source.protocol == main else "*"
    return f"{figure}{star}, {figure.kind} [{sources.index(figure.source) + 1}]"


def _cited(number: int, source: Source) -> str:
    """A source as a line."""
    note = f"; {source.note}" if source.note else ""
    return f"[{number}] {source.citation}: {source.protocol}{note}"


def _wrapped(text: str) -> list[str]:
    """A text in lines of bearable length, those after the first indented."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _plain(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    figures = [asdict(figure) | {"kind": figure.kind} for figure in row.figures]
    return {
        "model": row.model,
        "option": row.option.name,
        "key": row.option.key,
        "embedding_bits": row.option.embedding,
        "tool": row.option.tool,
        **asdict(row.cost),
        "total": row.cost.total,
        "fits": row.fits,
        "quality": figures or "unknown",
    }


def _plain_choice(choice: Choice | None) -> dict[str, Any] | None:
    """A choice as plain values."""
    return None if choice is None else _plain(choice.row) | {"command": choice.command}
