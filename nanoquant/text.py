"""The calibration text, cut into the windows of its three uses. Shapes: N windows of T tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanoquant.config import NanoQuantConfig
from nanoquant.data import make_windows
from nanoquant.mixture import SELF, Data, interleave
from nanoquant.text_plan import Needs, TextPlan, plan_text

Writer = Callable[[int, int, Tensor | None], Tensor]
"""Writes N windows of T tokens that go on from beginnings (n, P): :class:`SelfText`."""


@dataclass(frozen=True)
class Text:
    """Windows (N, T) of the three uses; held-out ones come from the end and are used nowhere else."""

    calibration: Tensor
    training: Tensor
    held_out: Tensor
    origin: list[dict[str, Any]] = field(default_factory=list)
    """Of each source: its name, what it holds, and its windows in each use, numbered as they come in it."""
    digest: str = ""
    """Of the whole plan, see :class:`TextPlan`."""


def split_text(
    data: Data | TextPlan,
    tokenizer: PreTrainedTokenizerBase | None,
    config: NanoQuantConfig,
    write: Writer | None = None,
) -> Text:
    """Cut the calibration text into distinct windows.

    Args:
        data: as in :func:`plan_text`.
        tokenizer: needed for text.
        config: how many windows of which length, and the seed that chooses them.
        write: writes the windows that the plan asks of the model.

    Raises:
        ValueError: the text is too short; tells how many windows there are and how many are needed.
    """
    plan = plan_text(data, tokenizer, config)
    needs, seed = Needs.of(config), config.run.seed
    kept, held_out, numbers, spare = [], [], [], []
    for source, count, held in zip(plan.sources, plan.kept, plan.held_out, strict=True):
        if source.tokens is None:
            windows, order = write(count + held, plan.own, None), torch.arange(count)
        else:
            windows = make_windows(source.tokens, plan.own)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(windows) - held, generator=generator)
            if config.self_text.windows:
                spare.append(windows[order.roll(-count)])
        kept.append(windows[order[:count]])
        held_out.append(windows[len(windows) - held :])
        numbers.append((order[:count].tolist(), range(len(windows) - held, len(windows))))
    rows = _mixed(kept)
    training, uses = rows[: needs.model], [max(needs.calibration, needs.blocks), needs.model]
    if config.self_text.windows:
        pool = _beginnings(_mixed(spare), config.self_text.prompt)
        training = torch.cat([training, write(config.self_text.windows, plan.own, pool)])
    parts = (rows[: uses[0]], training, torch.cat(held_out))
    origin = _origin(plan, numbers, uses)
    return Text(*(_with_bos(part, plan.bos) for part in parts), origin, plan.digest)


def _mixed(parts: list[Tensor]) -> Tensor:
    """Windows (N, T) of all sources, see :func:`interleave`."""
    counts = [len(part) for part in parts]
    begins = [sum(counts[:source]) for source in range(len(counts))]
    order = torch.empty(sum(counts), dtype=torch.long)
    turns = torch.tensor(interleave(counts))
    for source, begin in enumerate(begins):
        order[turns == source] = torch.arange(begin, begin + counts[source])
    return torch.cat(parts)[order]


def _beginnings(windows: Tensor, tokens: int) -> Tensor:
    """Pieces (n, P) of windows (N, T): first those at the beginning of each, then those behind them."""
    count = windows.shape[1] // tokens
    pieces = windows[:, : count * tokens].unflatten(1, (count, tokens))  # (N, count, P)
    return pieces.transpose(0, 1).flatten(0, 1)


def _origin(
    plan: TextPlan, numbers: list[tuple[list[int], range]], uses: list[int]
) -> list[dict[str, Any]]:
    """Of each source, its windows in each use."""
    found, turns = [], interleave(plan.kept)
    for number, (source, (kept, held)) in enumerate(zip(plan.sources, numbers, strict=True)):
        used = [kept[: turns[:use].count(number)] for use in uses]
        tokens = None if source.tokens is None else len(source.tokens)
        about = {"source": source.name, "weight": source.weight, "tokens": tokens}
        found.append(about | _uses(*used, held))
    if count := plan.config.self_text.windows:
        about = {"source": SELF, "weight": None, "tokens": None}
        found.append(about | _uses([], range(count), []))
    return found


def _uses(*parts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """How many windows calibration, training and held-out measurement have, and which."""
    named = dict(zip(("calibration", "training", "held_out"), parts, strict=True))
    return {
        "counts": {use: len(part) for use, part in named.items()},
        "windows": {use: _ranges(part) for use, part in named.items()},
    }


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as text: "0-3 5"."""
    parts = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in parts)


def _with_bos(windows: Tensor, bos: int | None) -> Tensor:
    """Windows (N, T) with BOS in front of their own tokens."""
    if bos is None:
        return windows
    return torch.cat([torch.full((len(windows), 1), bos, dtype=torch.long), windows], 1)
