"""What to use: the best option of the model itself, a smaller sibling where that is probably better, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoquant.advice.catalogue import CONFIGS, Named, larger_siblings, smaller_siblings
from nanoquant.advice.commands import command_for, hub_name
from nanoquant.advice.config import STRICT, Use
from nanoquant.advice.memory import COMFORT, longest_context
from nanoquant.advice.reasons import (
    comparison,
    dense_pair,
    fitting,
    needs,
    proof_for_itself,
    quality,
    taken,
)
from nanoquant.advice.rows import Row, Table, table_of, table_of_published
from nanoquant.advice.rules import LARGE_SHARE, Applied, Case, applied
from nanoquant.units import amount


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
    order = (8, 4, 16) if table.embedding_share >= LARGE_SHARE else (16, 8, 4)
    ours.sort(key=lambda r: (-r.option.bits, r.fits != "yes", order.index(r.option.embedding)))
    return next(iter([*ready, *ours]), None)


def best_sibling(named: Named, task: str, use: Use, memory: int) -> Row | None:
    """The largest smaller sibling that fits at 4 bits or more; where none does, at 1 or 2 if the task allows."""
    tables = [
        table_of_published(name, use, memory, named.post_trained)
        for name in smaller_siblings(named.published)
        if _positions_suffice(name, use)
    ]
    rows = [best_of_itself(table, task) for table in tables]
    careful = [row for row in rows if row is not None and row.careful]
    if careful:
        return min(careful, key=lambda row: _caution(row, task))
    low = [row for row in rows if row is not None and row.option.bits >= 1]
    if task in STRICT or not low:
        return None
    return min(low, key=lambda row: (row.fits != "yes", -row.option.bits))


def _positions_suffice(name: str, use: Use) -> bool:
    """Whether a published model is made for so long texts."""
    return CONFIGS[name]["max_position_embeddings"] >= use.context


def _caution(row: Row, task: str) -> tuple[bool, bool]:
    """What comes first among options of 4 bits or more: 8 bits for long context, then room."""
    return task == "long-context" and row.option.bits < 8, row.fits != "yes"


def _choice(row: Row, named: Named, use: Use) -> Choice:
    """A row with its command; a sibling is taken from where it is published."""
    source = named.source
    if row.model != named.name:
        source = hub_name(row.published, named.post_trained)
    return Choice(row, command_for(row.option, source, row.published, use.device))


def _explain_careful(advice: Advice, best: Row) -> None:
    """Reasons for an option of 4 bits or more of the model itself."""
    say = advice.reasons.append
    say(fitting(best, advice.memory))
    above = [r for r in advice.table.rows if r.careful and r.option.bits > best.option.bits]
    if above:
        nearest = min(above, key=lambda row: row.cost.total)
        without = "would leave no room" if nearest.fits == "tight" else "does not fit"
        say(f"More bits: {taken(nearest, advice.memory)} and {without}.")
    else:
        say("Nothing has to be quantized, so nothing is lost: nanoquant is not needed here.")
    if best.option.bits < 16:
        known = best.figure("perplexity")
        say(quality(best) if known else "Its quality on this model is not published.")
        say("nanoquant has nothing to offer at 4 bits and above; this is torchao's format.")
    larger = _larger_that_fits(advice)
    if larger is not None:
        text = f"{larger.model} fits as well, at {larger.option.name} ({amount(larger.cost.total)})"
        pair = dense_pair(larger.published, best.published)
        if pair is not None:
            text += f"; in bf16 its perplexity is {pair[0].text} against {pair[1].text}"
        say(f"{text}: consider it.")


def _larger_that_fits(advice: Advice) -> Row | None:
    """The largest larger sibling that fits with room at 4 bits or more; not for long context, where 8 are wanted."""
    found = None
    for name in larger_siblings(advice.named.published):
        if not _positions_suffice(name, advice.use):
            continue
        named, use = advice.named, advice.use
        rows = table_of_published(name, use, advice.memory, named.post_trained).fitting(
            careful=True
        )
        rows = [row for row in rows if row.fits == "yes" and not _caution(row, advice.task)[0]]
        found = rows[0] if rows else found
    return found


def _look_for_a_sibling(advice: Advice, best: Row | None) -> None:
    """The model itself does not fit at 4 bits: compare it with its smaller siblings."""
    say = advice.reasons.append
    say(needs(advice.named.name, advice.table))
    sibling = best_sibling(advice.named, advice.task, advice.use, advice.memory)
    if best is None:
        _explain_nothing(advice)
    if sibling is None:
        _without_sibling(advice, best)
        return
    winner = None if best is None else proof_for_itself(best, sibling)
    if winner is not None and advice.task not in STRICT:
        say(fitting(best, advice.memory))
        say(winner)
        return
    advice.recommended = _choice(sibling, advice.named, advice.use)
    say(f"{sibling.model} is smaller: {fitting(sibling, advice.memory)}")
    say(quality(sibling))
    if best is not None:
        say(comparison(best, sibling))
    tight = _tight_sibling(advice, sibling)
    if tight is not None:
        say(tight)


def _tight_sibling(advice: Advice, chosen: Row) -> str | None:
    """A larger sibling than the chosen one that fits without room, and the context that gives it room."""
    named, use = advice.named, advice.use
    for name in smaller_siblings(named.published):
        if name == chosen.published:
            return None
        table = table_of_published(name, use, advice.memory, named.post_trained)
        tight = [row for row in table.fitting(careful=True) if not _caution(row, advice.task)[0]]
        if _positions_suffice(name, use) and tight:
            row = min(tight, key=lambda row: row.cost.total)
            longest = longest_context(table.model, row.option, use, int(COMFORT * advice.memory))
            more = f"; with --context {longest} it has room" if longest else ""
            return f"{name} fits too, without room: {taken(row, advice.memory)}{more}."
    return None


def _without_sibling(advice: Advice, best: Row | None) -> None:
    """What is left where no smaller sibling fits or is known."""
    say = advice.reasons.append
    known = smaller_siblings(advice.named.published)
    if advice.named.published is None:
        say("Its family is not in the table of this command: look for a smaller sibling yourself.")
    elif known:
        bits = " at 4 bits or more" if advice.task in STRICT else ""
        say(f"No smaller sibling fits{bits} either ({', '.join(known)}).")
    else:
        say("It is the smallest of its family that this command knows.")
    if best is None:
        return
    if advice.task in STRICT:
        advice.recommended = None
        say(
            f"For {advice.task} nothing below 4 bits is recommended: {best.option.name} fits, but expect wrong "
            "answers."
        )
        return
    say(fitting(best, advice.memory))
    say(quality(best))


def _explain_nothing(advice: Advice) -> None:
    """Nothing fits: the smallest option, and what would make it fit."""
    say = advice.reasons.append
    row = min(advice.table.rows, key=lambda row: row.cost.total)
    say(
        f"Nothing of {advice.named.name} fits in {amount(advice.memory)}: the smallest, {row.option.name}, takes "
        f"{amount(row.cost.total)} (weights {amount(row.cost.weights)}, cache {amount(row.cost.cache)}, "
        f"activations {amount(row.cost.activations)})."
    )
    longest = longest_context(advice.table.model, row.option, advice.use, advice.memory)
    if longest:
        say(f"With --context {longest} or less it would fit.")
