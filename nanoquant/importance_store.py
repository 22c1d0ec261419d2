"""Importances of a model's linears, kept a block at a time, so that those of one block are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nanoquant.importance import Importance
from nanoquant.second_moment import Correlation
from nanoquant.tensor_file import Content, TensorFile


class ImportanceStore:
    """Each block's importances in a file of its own, or in memory where nothing is kept on the disk.

    Args:
        files: gives the file of a block; without a path, nothing is kept on the disk.
    """

    def __init__(self, files: Callable[[int], TensorFile]) -> None:
        self._new = files
        self._files: dict[int, TensorFile] = {}
        self._held: dict[int, dict[str, Importance]] = {}

    def file(self, b: int) -> TensorFile:
        """The file of a block, which may not be there."""
        if b not in self._files:
            self._files[b] = self._new(b)
        return self._files[b]

    def keep(self, b: int, importances: Mapping[str, Importance]) -> None:
        """Keep the importances of a block by full name. Errors as of :meth:`TensorFile.write`."""
        file = self.file(b)
        file.write(*as_tensors(importances))
        if file.path is None:
            self._held[b] = dict(importances)

    def has(self, b: int) -> bool:
        """Whether those of a block are kept. Errors as of :meth:`TensorFile.read`."""
        return b in self._held or bool(self.file(b).values())

    def __call__(self, b: int) -> dict[str, Importance]:
        """Importances of a kept block by full name."""
        return self._held[b] if b in self._held else from_tensors(self.file(b).read())

    def diagonals(self, blocks: range) -> dict[str, Importance]:
        """Importances of kept blocks by full name, without correlations, which are not read."""
        nothing, found = {"input_correlation": None, "output_correlation": None}, {}
        for b in blocks:
            if b in self._held:
                found |= {full: replace(known, **nothing) for full, known in self._held[b].items()}
            else:
                found |= from_tensors(self.file(b).read(_is_diagonal))
        return found

    def release(self) -> None:
        """Let go of those that are in memory: nothing asks for a block any more."""
        self._held.clear()


def statistics_bytes(
    shapes: Sequence[tuple[int, int]], inputs: Sequence[int], curvature: str
) -> int:
    """Bytes of importances: correlations of inputs and of outputs with their spreads, and each channel's own.

    Args:
        shapes: (d_out, d_in) of the linears.
        inputs: d_in of every tensor that they read.
        curvature: of :class:`nanoquant.importance.ImportanceConfig`.
    """
    known = [*inputs] if curvature != "diagonal" else []
    known += [d_out for d_out, _ in shapes] if curvature == "both" else []
    return 4 * (sum(d * (d + 1) for d in known) + sum(map(sum, shapes)))


def as_tensors(importances: Mapping[str, Importance]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a file; a correlation that linears share is in it once."""
    tensors, linears, numbers = {}, {}, {}
    for full, found in importances.items():
        tensors |= {f"{full}.input": found.input, f"{full}.output": found.output}
        both = (found.input_correlation, found.output_correlation)
        for known in both:
            if known is not None and id(known) not in numbers:
                n = numbers[id(known)] = len(numbers)
                tensors |= {f"{n}.Q": known.Q, f"{n}.spread": known.spread}
        linears[full] = (found.scale, *(numbers.get(id(known)) for known in both))
    return tensors, {"linears": linears, "correlations": len(numbers)}


def from_tensors(content: Content) -> dict[str, Importance]:
    """Importances by full name of what :func:`as_tensors` gave; without correlations where these were not read."""
    tensors, values = content
    known = [
        Correlation(tensors[f"{n}.Q"], tensors[f"{n}.spread"]) if f"{n}.Q" in tensors else None
        for n in range(values["correlations"])
    ]
    return {
        full: Importance(
            tensors[f"{full}.input"],
            tensors[f"{full}.output"],
            *(None if n is None else known[n] for n in numbers),
            scale=scale,
        )
        for full, (scale, *numbers) in values["linears"].items()
    }


def _is_diagonal(name: str) -> bool:
    """Whether a tensor is of no correlation."""
    return not name.endswith((".Q", ".spread"))
