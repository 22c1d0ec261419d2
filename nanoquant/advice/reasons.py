"""Sentences that say why: what a row takes, what is known of its quality, how two rows compare."""

from __future__ import annotations

from nanoquant.advice.memory import COMFORT
from nanoquant.advice.published import Figure, figures_of
from nanoquant.advice.rows import Row, Table
from nanoquant.units import amount


def needs(name: str, table: Table) -> str:
    """How much memory the model needs at 4 bits."""
    careful = [row for row in table.rows if row.careful]
    least = min(careful, key=lambda row: row.cost.total)
    return (
        f"{name} does not fit at 4 bits or more: {least.option.name} takes "
        f"{amount(least.cost.total)}, so {amount(int(least.cost.total / COMFORT))} would do with room."
    )


def fitting(row: Row, memory: int) -> str:
    """That a row fits, and how."""
    text = taken(row, memory)
    if row.fits == "tight":
        return f"{text}, which is tight: contexts of a GPU and fragments are not counted."
    return f"{text}."


def taken(row: Row, memory: int) -> str:
    """What a row takes of the memory."""
    return f"{row.option.name} takes {amount(row.cost.total)} of {amount(memory)}"


def quality(row: Row) -> str:
    """What is known of the quality of a row."""
    known = row.figure("perplexity")
    if known is not None:
        return f"Perplexity of {row.model} so: {known} ({known.kind}, {known.source.citation})."
    dense = figures_of(row.published, "bf16", "perplexity")
    text = f"Its perplexity at {row.option.name} is unknown"
    near = figures_of(row.published, row.option.key, "perplexity")
    if row.option.embedding != 16 and near:
        text += f"; with the embedding in bf16 it is {near[0].text}"
    return text + (f"; in bf16 it is {dense[0].text}." if dense else ".")


def dense_pair(one: str | None, two: str | None) -> tuple[Figure, Figure] | None:
    """Perplexities of two models in bf16 by one protocol; None where there are none."""
    for first in figures_of(one, "bf16", "perplexity"):
        for second in figures_of(two, "bf16", "perplexity", first.source.protocol):
            return first, second
    return None


def _common(best: Row, sibling: Row) -> tuple[Figure, Figure, bool] | None:
    """Perplexities of two rows by one protocol, and whether the sibling's is of its bf16; None where there are none."""
    for option, dense in ((sibling.option.key, False), ("bf16", True)):
        for own in figures_of(best.published, best.option.key, "perplexity"):
            for other in figures_of(sibling.published, option, "perplexity", own.source.protocol):
                return own, other, dense
    return None


def proof_for_itself(best: Row, sibling: Row) -> str | None:
    """Why the model itself is better than the sibling, by figures of one protocol; None without such a proof."""
    found = _common(best, sibling)
    if found is None or best.option.embedding != 16:
        return None
    own, other, dense = found
    if own.value >= other.value:
        return None
    at = "bf16" if dense else sibling.option.name
    return (
        f"By published figures of one protocol ({own.source.protocol}) it has perplexity {own.text}, and "
        f"{sibling.model} in {at} {other.text}: the larger model wins here, at general text."
    )


def comparison(best: Row, sibling: Row) -> str:
    """The two side by side, as far as figures of one protocol go."""
    found = _common(best, sibling)
    if found is None:
        return (
            f"No figures compare it with {best.option.name} of {best.model}; the rules above make it the better "
            "guess. Evaluate both on your own text."
        )
    own, other, dense = found
    held = "" if best.option.embedding == 16 else " (with its embedding in bf16)"
    at = "bf16" if dense else sibling.option.name
    return (
        f"{best.model} at {best.option.label}{held} has {own.text} by the protocol in which {sibling.model} has "
        f"{other.text} at {at}."
    )
