"""Schedules of a block: which of its linears are made binary together, one round after the other."""

from __future__ import annotations

from collections.abc import Callable

Groups = tuple[tuple[str, ...], ...]


def published_rounds(groups: Groups) -> Groups:
    """One linear a round in the order of the published code: q, v, o, k, gate, up, down.

    The first group of three (q, k, v) gives its second member back after the linear that follows it.
    """
    order = [name for group in groups for name in group]
    if len(groups) > 1 and len(groups[0]) == 3:
        k = order.pop(1)
        order.insert(3, k)
    return tuple((name,) for name in order)


SCHEDULES: dict[str, Callable[[Groups], Groups]] = {
    "published": published_rounds,
    "grouped": lambda groups: groups,
    "algorithm1": lambda groups: (tuple(name for group in groups for name in group),),
}
