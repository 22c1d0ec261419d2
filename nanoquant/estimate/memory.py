"""Most memory of every phase of ``nanoquant quantize``, by the formulas of ``initialization`` and ``student``."""

from __future__ import annotations

from collections.abc import Callable

from nanoquant.estimate import initialization, student
from nanoquant.estimate.quantities import Quantities
from nanoquant.estimate.terms import Need, Term
from nanoquant.self_text import PHASE as WRITE_TEXT

CUDA = 600 * 10**6
"""Bytes that CUDA and its libraries take on a GPU, and again in main memory; assumed, nobody has measured it."""

HEAP = 256 << 20
"""Bytes of tokenizer, texts, records, and of what the heap keeps; at most 0.22 GB on a model of 135M."""


def needs(q: Quantities) -> list[Need]:
    """What each phase takes at most, in order."""
    measured = q.use.length is not None
    phases: list[tuple[str, Callable[[Quantities], list[Term]], bool]] = [
        ("load", initialization.load, True),
        ("measure dense", initialization.measure_dense, measured),
        (WRITE_TEXT, initialization.write_text, q.written > 0),
        ("calibrate", initialization.calibrate, True),
        ("ranks", initialization.choose_ranks, q.config.budget.allocation == "measured"),
        ("blocks", initialization.blocks, True),
        ("model", student.model, q.config.model.train != "none"),
        ("pack", student.pack, True),
        ("save", student.pack, True),
        ("measure in a fresh process", student.measure_fresh, measured or q.use.verify),
    ]
    always = [Term("the process with its libraries", q.use.base, host=True)]
    always.append(Term("texts, tokenizer, and what the heap keeps", HEAP, host=True))
    if q.use.gpu:
        always += [Term("CUDA", CUDA), Term("CUDA in main memory", CUDA, host=True)]
        always.append(Term("dense weights in main memory", q.at_home, host=True))
    return [Need(name, (*always, *terms(q)), q.use.gpu) for name, terms, runs in phases if runs]
