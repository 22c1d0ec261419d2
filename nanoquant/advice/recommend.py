"""What to use: the best option of the model itself, a smaller sibling where that is probably better, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoquant.advice.catalogue import CONFIGS, Named, larger_siblings, smaller_siblings
from nanoquant.advice.commands import command_for, hub_name
from nanoquant.advice.config import STRICT, Use
from nanoquant.advice.memory import COMFORT, longest_context
from nanoquant.advice.options import BF16
from nanoquant.advice.published import Figure, figures_of
from nanoquant.advice.rows import Row, Table, table_of, table_of_published
from nanoquant.advice.rules import LARGE_SHARE, Applied, Case, applied

GB = 1e9


@dataclass(frozen=True)
class Choice:
    """One thing to do."""

    row: Row
    command: str


@dataclass
class Advice:
    """The answer."""

    named: Named
    task: str
    use: Use
    memory: int
    table: Table
    rules: list[Applied]
    recommended: Choice | None
    """What is recommended; None where nothing that fits can be."""
    itself: Choice | None
    """The best option of the model itself that fits."""
    reasons: list[str] = field(default_factory=list)
    """Why, one sentence or two each."""


def advise(named: Named, task: str, use: Use, memory: int) -> Advice:
    """Work out what to use.

    Args:
        named: the model.
        task: what it is for.
        use: context, batch, device and cache.
        memory: bytes of the device.

    Raises:
        ValueError: the model's shapes can't be counted.
    """
    table = table_of(named, use, memory)
    best = best_of_itself(table, task)
    rules = applied(Case(named, task, use, table, best))
    itself = None if best is None else _choice(best, named, use)
    advice = Advice(named, task, use, memory, table, rules, itself, itself)
    if best is not None and best.careful:
        _explain_careful(advice, best)
    else:
        _look_for_a_sibling(advice, best)
    return advice


def best_of_itself(table: Table, task: str) -> Row | None:
    """The option with most bits that fits: at 4 bits or more one with room first, below those that hold up."""
    careful = table.fitting(careful=True)
    if careful:
        return min(careful, key=lambda row: _caution(row, task))
    ready = table.fitting(tool="aqlm")
    ours = table.fitting(tool="nanoquant")
    share = _embedding_share(table)
    order = (8, 4, 16) if share >= LARGE_SHARE else (16, 8, 4)
    ours.sort(key=lambda r: (-r.option.bits, r.fits != "yes", order.index(r.option.embedding)))
    return next(iter([*ready, *ours]), None)


def best_sibling(named: Named, task: str, use: Use, memory: int) -> Row | None:
    """The largest smaller sibling that fits at 4 bits or more; where none does, at 1 bit unless the task forbids it."""
    tables = [
        table_of_published(name, use, memory)
        for name in smaller_siblings(named.published)
        if _positions_suffice(name, use)
    ]
    rows = [best_of_itself(table, task) for table in tables]
    careful = [row for row in rows if row is not None and row.careful]
    if careful:
        return min(careful, key=lambda row: _caution(row, task))
    low = [row for row in rows if row is not None and row.option.bits >= 1]
    return None if task in STRICT else next(iter(low), None)


def _positions_suffice(name: str, use: Use) -> bool:
    """Whether a published model is made for so long texts."""
    return CONFIGS[name]["max_position_embeddings"] >= use.context


def _caution(row: Row, task: str) -> tuple[bool, bool]:
    """What comes first among options of 4 bits or more: 8 bits for long context, then room."""
    return task == "long-context" and row.option.bits < 8, row.fits != "yes"


def _embedding_share(table: Table) -> float:
    """Share of embedding and head in the weights with linears at 1 bit; 0 where 1 bit is not possible."""
    row = table.row("1.0")
    return 0.0 if row is None else BF16 * table.model.table_weights / row.cost.weights


def _choice(row: Row, named: Named, use: Use) -> Choice:
    """A row with its command; a sibling is taken from where it is published."""
    source = named.source
    if row.model != named.name:
        source = hub_name(row.published, named.post_trained)
    return Choice(row, command_for(row.option, source, row.published, use.device))


def _explain_careful(advice: Advice, best: Row) -> None:
    """Reasons for an option of 4 bits or more of the model itself."""
    say = advice.reasons.append
    say(_fits_sentence(best, advice.memory))
    skipped = [r for r in advice.table.rows if r.careful and r.option.bits > best.option.bits]
    if any(row.fits == "no" for row in skipped):
        least = min(r.cost.total for r in skipped if r.fits == "no")
        say(f"More bits a weight would take {least / GB:.2f} GB and more.")
    elif best.option.bits == 16:
        say("Nothing has to be quantized, so nothing is lost: nanoquant is not needed here.")
    if best.option.bits < 16:
        known = best.figure("perplexity")
        say(_quality_sentence(best) if known else "Its quality on this model is not published.")
        say("nanoquant has nothing to offer at 4 bits and above; this is torchao's format.")
    larger = _larger_that_fits(advice)
    if larger is not None:
        text = f"{larger.model} fits as well, at {larger.option.name} ({larger.cost.total / GB:.2f} GB)"
        pair = _dense_pair(larger.published, best.published)
        if pair is not None:
            text += f"; in bf16 its perplexity is {pair[0].value:g} against {pair[1].value:g}"
        say(f"{text}: consider it.")


def _larger_that_fits(advice: Advice) -> Row | None:
    """The largest larger sibling that fits with room at 4 bits or more; not for long context, where 8 are wanted."""
    found = None
    for name in larger_siblings(advice.named.published):
        if not _positions_suffice(name, advice.use):
            continue
        rows = table_of_published(name, advice.use, advice.memory).fitting(careful=True)
        rows = [row for row in rows if row.fits == "yes" and not _caution(row, advice.task)[0]]
        found = rows[0] if rows else found
    return found


def _look_for_a_sibling(advice: Advice, best: Row | None) -> None:
    """The model itself does not fit at 4 bits: compare it with its smaller siblings."""
    say = advice.reasons.append
    say(_needs_sentence(advice))
    sibling = best_sibling(advice.named, advice.task, advice.use, advice.memory)
    if best is None:
        _explain_nothing(advice)
    if sibling is None:
        _without_sibling(advice, best)
        return
    winner = None if best is None else _proof_for_itself(best, sibling)
    if winner is not None and advice.task not in STRICT:
        say(_fits_sentence(best, advice.memory))
        say(winner)
        return
    advice.recommended = _choice(sibling, advice.named, advice.use)
    say(f"{sibling.model} is smaller: {_fits_sentence(sibling, advice.memory)}")
    say(_quality_sentence(sibling))
    if best is not None:
        say(_comparison(best, sibling))


def _without_sibling(advice: Advice, best: Row | None) -> None:
    """What is left where no smaller sibling fits or is known."""
    say = advice.reasons.append
    known = smaller_siblings(advice.named.published)
    if advice.named.published is None:
        say(
            "No smaller sibling of this model is in the table of this command; look for one yourself."
        )
    else:
        say(f"No smaller sibling that fits is known (of {', '.join(known) or 'none'}).")
    if best is None:
        return
    if advice.task in STRICT:
        advice.recommended = None
        say(
            f"For {advice.task} nothing below 4 bits is recommended: {best.option.name} fits, but expect wrong "
            "answers."
        )
        return
    say(_fits_sentence(best, advice.memory))
    say(_quality_sentence(best))


def _explain_nothing(advice: Advice) -> None:
    """Nothing fits: the smallest option, and what would make it fit."""
    say = advice.reasons.append
    row = min(advice.table.rows, key=lambda row: row.cost.total)
    say(
        f"Nothing of {advice.named.name} fits in {advice.memory / GB:.2f} GB: the smallest, {row.option.name}, takes "
        f"{row.cost.total / GB:.2f} GB ({row.cost.weights / GB:.2f} weights, {row.cost.cache / GB:.2f} cache, "
        f"{row.cost.activations / GB:.2f} activations)."
    )
    longest = longest_context(advice.table.model, row.option, advice.use, advice.memory)
    if longest:
        say(f"With --context {longest} or less it would fit.")


def _needs_sentence(advice: Advice) -> str:
    """How much memory the model needs at 4 bits."""
    careful = [row for row in advice.table.rows if row.careful]
    least = min(careful, key=lambda row: row.cost.total)
    return (
        f"{advice.named.name} does not fit at 4 bits or more: {least.option.name} takes "
        f"{least.cost.total / GB:.2f} GB, so {least.cost.total / COMFORT / GB:.1f} GB would do with room."
    )


def _fits_sentence(row: Row, memory: int) -> str:
    """That a row fits, and how."""
    text = f"{row.option.name} takes {row.cost.total / GB:.2f} of {memory / GB:.2f} GB"
    if row.fits == "tight":
        return f"{text}; that is tight, as the context of a GPU and fragments are not counted."
    return f"{text}."


def _quality_sentence(row: Row) -> str:
    """What is known of the quality of a row."""
    known = row.figure("perplexity")
    if known is not None:
        return f"Perplexity of {row.model} so: {known} ({known.kind}, {known.source.citation})."
    dense = figures_of(row.published, "bf16", "perplexity")
    text = f"Its perplexity at {row.option.name} is unknown"
    near = figures_of(row.published, row.option.key, "perplexity")
    if row.option.embedding != 16 and near:
        text += f"; with the embedding in bf16 it is {near[0].value:g}"
    return text + (f"; in bf16 it is {dense[0].value:g}." if dense else ".")


def _dense_pair(one: str | None, two: str | None) -> tuple[Figure, Figure] | None:
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


def _proof_for_itself(best: Row, sibling: Row) -> str | None:
    """Why the model itself is better than the sibling, by figures of one protocol; None without such a proof."""
    found = _common(best, sibling)
    if found is None or best.option.embedding != 16:
        return None
    own, other, dense = found
    if own.value >= other.value:
        return None
    at = "bf16" if dense else sibling.option.name
    return (
        f"By published figures of one protocol ({own.source.protocol}) it has perplexity {own.value:g}, and "
        f"{sibling.model} in {at} {other.value:g}: the larger model wins here, at general text."
    )


def _comparison(best: Row, sibling: Row) -> str:
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
        f"{best.model} at {best.option.label}{held} has {own.value:g} by the protocol in which {sibling.model} has "
        f"{other.value:g} at {at}."
    )
