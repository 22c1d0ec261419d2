"""The table of options of one model: what each takes, whether it fits, and what is known of its quality."""

from __future__ import annotations

from dataclasses import dataclass

from nanoquant.advice.anatomy import Anatomy, anatomy
from nanoquant.advice.catalogue import CONFIGS, Named
from nanoquant.advice.config import Use
from nanoquant.advice.memory import Cost, cost
from nanoquant.advice.options import LEAST_CAREFUL_BITS, OTHERS, OURS, Option
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
    return _table(named.name, named.published, shapes, use, memory, ready=not named.post_trained)


def table_of_published(name: str, use: Use, memory: int) -> Table:
    """Every option of a published model."""
    return _table(name, name, anatomy(model_config(name, published=CONFIGS)), use, memory)


def _table(
    name: str,
    published: str | None,
    model: Anatomy,
    use: Use,
    memory: int,
    ready: bool = True,
) -> Table:
    """Rows of a model; ``ready`` says whether ready-made checkpoints are of the same version."""
    rows, impossible = [], []
    for option in (*OTHERS, *OURS):
        if use.device not in option.devices:
            continue
        known = figures_of(published, option.key) if option.embedding == 16 else []
        if option.tool == "aqlm" and not (known and ready):
            continue
        try:
            price = cost(model, option, use)
        except ValueError as error:
            impossible.append(f"{option.name}: {error}")
            continue
        fits = price.fits(memory)
        rows.append(Row(name, published, option, price, fits, tuple(known)))
    return Table(model, tuple(rows), tuple(impossible))
