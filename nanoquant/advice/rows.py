"""The table of options of one model: what each takes, whether it fits, and what is known of its quality."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from nanoquant.advice.anatomy import Anatomy, anatomy
from nanoquant.advice.catalogue import CONFIGS, Named
from nanoquant.advice.config import Use
from nanoquant.advice.memory import Cost, cost
from nanoquant.advice.options import BF16, LEAST_CAREFUL_BITS, OTHERS, OURS, Option
from nanoquant.advice.published import Figure, figures_of
from nanoquant.benchmark.shapes import model_config


@dataclass(frozen=True)
class Row:
    """One option of one model."""

    model: str
    """Name of the model, as tables show it."""
    published: str | None
    """The published model that it is or has the shapes of."""
    option: Option
    cost: Cost
    fits: str
    """As :meth:`Cost.fits` says."""
    figures: tuple[Figure, ...]
    """What is known of its quality."""

    @property
    def careful(self) -> bool:
        """Whether it keeps as many bits as most work calls safe."""
        return self.option.bits >= LEAST_CAREFUL_BITS

    def figure(self, metric: str) -> Figure | None:
        """The first figure of a metric; None where it is unknown."""
        return next((figure for figure in self.figures if figure.metric == metric), None)


@dataclass(frozen=True)
class Table:
    """Every option of one model."""

    model: Anatomy
    rows: tuple[Row, ...]
    """Options that go with its shapes."""
    impossible: tuple[str, ...]
    """Those that do not, and why."""

    def fitting(self, *, careful: bool | None = None, tool: str | None = None) -> list[Row]:
        """Rows that fit, those with room first, else in order."""
        found = [
            row
            for row in self.rows
            if row.fits != "no"
            and careful in (None, row.careful)
            and tool in (None, row.option.tool)
        ]
        return sorted(found, key=lambda row: row.fits != "yes")

    @property
    def embedding_share(self) -> float:
        """Share of embedding and head in bf16 in the weights with linears at 1 bit; 0 where that is not possible."""
        row = self.row("1.0")
        return 0.0 if row is None else BF16 * self.model.table_weights / row.cost.weights

    def main_protocol(self, metric: str) -> str | None:
        """The protocol of most figures that are shown; those of others do not compare with them."""
        found = [row.figure(metric) for row in self.rows]
        counts = Counter(figure.source.protocol for figure in found if figure is not None)
        return max(counts, key=counts.__getitem__) if counts else None

    def row(self, key: str, embedding: int = 16) -> Row | None:
        """The row of an option; None where it is not possible."""
        wanted = key, embedding
        return next((r for r in self.rows if (r.option.key, r.option.embedding) == wanted), None)


def table_of(named: Named, use: Use, memory: int) -> Table:
    """Every option of a model that was asked for.

    Raises:
        ValueError: its shapes can't be counted.
    """
    shapes = anatomy(named.config)
    return _table(named.name, named.published, shapes, use, memory, named.post_trained)


def table_of_published(name: str, use: Use, memory: int, post_trained: bool) -> Table:
    """Every option of a published model, in its base version or the one for chat."""
    return _table(name, name, _published_anatomy(name), use, memory, post_trained)


@functools.cache
def _published_anatomy(name: str) -> Anatomy:
    """Shapes of a published model; a case asks for those of a sibling several times."""
    return anatomy(model_config(name, published=CONFIGS))


def _table(
    name: str,
    published: str | None,
    model: Anatomy,
    use: Use,
    memory: int,
    post_trained: bool,
) -> Table:
    """Rows of a model; figures of its own version come first."""
    rows, impossible = [], []
    for option in (*OTHERS, *OURS):
        if use.device not in option.devices:
            continue
        known = figures_of(published, option.key) if option.embedding == 16 else []
        known.sort(key=lambda figure: figure.source.post_trained != post_trained)
        if option.tool == "aqlm" and (post_trained or not known):
            continue  # what is ready-made is of base models
        try:
            price = cost(model, option, use)
        except ValueError as error:
            impossible.append(f"{option.name}: {error}")
            continue
        fits = price.fits(memory)
        rows.append(Row(name, published, option, price, fits, tuple(known)))
    return Table(model, tuple(rows), tuple(impossible))
