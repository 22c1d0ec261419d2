"""What each linear of a decoder block is for: q, k, v, o, gate, up, down, found from structure, not from names.

Linears that read one tensor and run one after another form a run. A block of attention and MLP has four: attention
inputs, attention output, MLP inputs, MLP output, also where attention and MLP read the same tensor. Widths tell
fused ones apart. Order within a run is that of execution: q, k, v and gate, up.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoquant.architectures import Decoder, linear_shape

QKV = {1: ("q+k+v",), 2: ("q", "k+v"), 3: ("q", "k", "v")}
"""Roles of the attention's inputs, by how many there are."""


@dataclass(frozen=True)
class Place:
    """Where in the model a linear is."""

    depth: float
    """Of its block: 0 the first, 1 the last of the model; 0.5 where there is only one."""
    role: str
    """q, k, v, o, gate, up, down; parts of a fused one joined by ``+``; empty if unknown."""


def layer_places(decoder: Decoder, chosen: range) -> dict[str, Place]:
    """Place of every linear of the chosen blocks, by full name."""
    places = {}
    for b in chosen:
        shapes = {n: linear_shape(decoder.blocks[b].get_submodule(n)) for n in decoder.linears[b]}
        depth = b / (len(decoder.blocks) - 1) if len(decoder.blocks) > 1 else 0.5
        for name, role in block_roles(decoder.linears[b], decoder.groups[b], shapes).items():
            places[decoder.full_name(b, name)] = Place(depth, role)
    return places


def block_roles(
    order: Sequence[str],
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, str]:
    """Role of each linear of one block; empty where structure does not tell.

    Args:
        order: names of the linears, in order of execution.
        groups: the same names, those together that read one tensor.
        shapes: name to (d_out, d_in).
    """
    group_of = {name: k for k, group in enumerate(groups) for name in group}
    runs = [list(run) for _, run in itertools.groupby(order, key=group_of.__getitem__)]
    roles = dict.fromkeys(order, "")
    if len(runs) >= 4:
        roles |= _attention(runs[0], runs[1], shapes)
    if len(runs) >= 2:
        roles |= _mlp(runs[-2], runs[-1], shapes)
    return roles


def _attention(
    inputs: list[str], outputs: list[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Roles of two runs, if their widths are those of attention."""
    if not _returns(inputs, outputs, shapes) or len(inputs) not in QKV:
        return {}
    width = shapes[outputs[0]][1]  # of all heads
    first, fused = shapes[inputs[0]][0], len(inputs) == 1
    if first < width or (first > width and not fused):
        return {}
    names = ("q",) if fused and first == width else QKV[len(inputs)]
    return {**dict(zip(inputs, names, strict=True)), outputs[0]: "o"}


def _mlp(
    inputs: list[str], outputs: list[str], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Roles of two runs, if their widths are those of an MLP."""
    if not _returns(inputs, outputs, shapes):
        return {}
    width = shapes[outputs[0]][1]
    widths = [shapes[name][0] for name in inputs]
    names = {(width,): ("up",), (2 * width,): ("gate+up",), (width, width): ("gate", "up")}
    if tuple(widths) not in names:
        return {}
    return {**dict(zip(inputs, names[tuple(widths)], strict=True)), outputs[0]: "down"}


def _returns(inputs: list[str], outputs: list[str], shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a single output leads back to the width that the inputs read."""
    return len(outputs) == 1 and shapes[outputs[0]][0] == shapes[inputs[0]][1]
