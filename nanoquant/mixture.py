"""Several texts in given shares. Shapes: n tokens of a source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanoquant.data import load_tokens

SELF = "self"
"""The source that the model writes itself; a file of that name is ./self."""


@dataclass(frozen=True)
class Source:
    """One text of a mixture."""

    name: str
    """As the user called it."""
    tokens: Tensor | None
    """Token ids (n,); None for what the model writes itself."""
    weight: float | None = None
    """Share of windows beside the other weights; None: in proportion to what the text holds."""


Data = str | Path | Tensor | Sequence[str | Path] | Sequence[Source]


def read_sources(data: Data, tokenizer: PreTrainedTokenizerBase | None) -> list[Source]:
    """Read a text or several.

    Args:
        data: a source as in :func:`load_tokens`, "self", or a list of them, each with its weight as NAME=WEIGHT
            or all without; sources that are read already are given back.
        tokenizer: needed for text.

    Raises:
        ValueError: a source can't be read or comes twice, a weight is no positive number, or some lack one.
    """
    if isinstance(data, Tensor):
        return [Source("tokens", load_tokens(data, tokenizer))]
    asked = [data] if isinstance(data, str | Path) else list(data)
    if asked and all(isinstance(item, Source) for item in asked):
        return asked
    if not asked:
        raise ValueError('the list of texts is empty; give at least one text, or "self"')
    parts = [_split(str(item)) for item in asked]
    names = [name if name == SELF else str(Path(name).expanduser().absolute()) for name, _ in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} comes twice; give every text once, with a weight")
    if len(parts) > 1:
        _check_weights(parts)
    return [
        Source(name, None if name == SELF else load_tokens(name, tokenizer), weight)
        for name, weight in parts
    ]


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``count``, in proportion to the weights; none is off by 1 or more."""
    exact = [count * weight / sum(weights) for weight in weights]
    parts = [math.floor(value) for value in exact]
    by_rest = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_rest[: count - sum(parts)]:
        parts[i] += 1
    return parts


def interleave(counts: Sequence[int]) -> list[int]:
    """Numbers of sources, each as often as ``counts`` says, so that every beginning is mixed like the whole."""
    places = [
        ((k + 0.5) / count, source) for source, count in enumerate(counts) for k in range(count)
    ]
    return [source for _, source in sorted(places)]


def _split(item: str) -> tuple[str, float | None]:
    """Name and weight of NAME=WEIGHT; a file of the whole name has none."""
    name, sign, weight = item.rpartition("=")
    if not sign or Path(item).expanduser().exists():
        return item, None
    try:
        value = float(weight)
    except ValueError:
        return item, None  # reading it says that there is no such file
    if not (0 < value < math.inf and name):
        raise ValueError(f"{item}: a weight must be above 0, as in train.txt=2")
    return name, value


def _check_weights(parts: list[tuple[str, float | None]]) -> None:
    """Refuse a mixture of which only some have a weight."""
    lacking = [name for name, weight in parts if weight is None]
    if lacking and (len(lacking) < len(parts) or SELF in lacking):
        raise ValueError(
            f"{', '.join(lacking)} has no weight; give all texts one, as in train.txt=3 self=1, or none, but "
            '"self", which has no size of its own, needs one beside others'
        )
