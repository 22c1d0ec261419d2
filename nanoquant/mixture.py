"""Several texts in given shares. Shapes: n tokens of a source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanoquant.data import load_tokens, local_path

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

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(
                f"{self.name}: a weight must be above 0, as in train.txt=2, got {self.weight:g}"
            )


Data = str | Path | Tensor | Sequence[str | Path] | Sequence[Source]


def read_sources(
    data: Data, tokenizer: PreTrainedTokenizerBase | None, wanted: int = 0
) -> list[Source]:
    """Read a text or several.

    Args:
        data: a source as in :func:`load_tokens`, "self", or a list of them, each with its weight as NAME=WEIGHT
            or all without; sources that are read already are given back.
        tokenizer: needed for text.
        wanted: tokens that all are asked for together, see :func:`load_tokens`.

    Raises:
        ValueError: a source can't be read or comes twice, a weight is no positive number, or some lack one.
    """
    if isinstance(data, Tensor):
        return [Source("tokens", load_tokens(data, tokenizer))]
    asked = [data] if isinstance(data, str | Path) else list(data)
    if not asked:
        raise ValueError('the list of texts is empty; give at least one text, or "self"')
    if all(isinstance(item, Source) for item in asked):
        _check_weights(asked)
        return asked
    if not all(isinstance(item, str | Path) for item in asked):
        kinds = ", ".join(type(item).__name__ for item in asked)
        raise ValueError(f"a list of texts holds names or Sources, not both, got {kinds}")
    named = [_split(item) for item in asked]
    paths = [s.name if s.name == SELF else _location(s.name) for s in named]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} comes twice; give every text once, with a weight")
    _check_weights(named)
    return [
        s if s.name == SELF else replace(s, tokens=load_tokens(s.name, tokenizer, wanted))
        for s in named
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


def _split(item: str | Path) -> Source:
    """Name and weight of NAME=WEIGHT, not read yet; a file of the whole name has none."""
    if isinstance(item, Path):
        item = f"./{item}" if str(item) == SELF else str(item)  # a path is never the model
    name, sign, weight = item.rpartition("=")
    if not sign or local_path(item).exists():
        return Source(item, None)
    try:
        value = float(weight)
    except ValueError:
        return Source(item, None)  # reading it says that there is no such file
    if not name:
        raise ValueError(f"{item} has a weight and no text; give both, as in train.txt=2")
    return Source(name, None, value)


def _location(name: str) -> str:
    """Where a file really lies, whatever it is called; a data set has its name in the folder's place."""
    return str(local_path(name).resolve())


def _check_weights(sources: Sequence[Source]) -> None:
    """Refuse a mixture of which only some have a weight, or whose weights have no finite sum."""
    if not math.isfinite(sum(source.weight or 0 for source in sources)):
        weights = " and ".join(f"{source.weight:g}" for source in sources if source.weight)
        raise ValueError(
            f"the weights {weights} of the texts have no finite sum; give smaller ones, as in train.txt=3 self=1"
        )
    lacking = [source.name for source in sources if source.weight is None]
    if len(sources) > 1 and lacking and (len(lacking) < len(sources) or SELF in lacking):
        raise ValueError(
            f"{', '.join(lacking)} has no weight; give all texts one, as in train.txt=3 self=1, or none, but "
            '"self", which has no size of its own, needs one beside others'
        )
