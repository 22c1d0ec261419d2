"""Most memory of the phases up to the quantized blocks, as sums of terms.

Weights that stay in their files count as one block and what lies around the blocks, because a block that is done is let
go of. Shapes: N windows, T tokens a window, d hidden size, V vocabulary.
"""

from __future__ import annotations

from nanoquant.estimate import work
from nanoquant.estimate.quantities import Quantities
from nanoquant.estimate.terms import ACTIVATIONS, Term
from nanoquant.methods import method_of
from nanoquant.units import parse_bytes

CHECKED = 1 << 24
"""Values that are looked at together for finite ones."""


def load(q: Quantities) -> list[Term]:
    """Reading the weights; where they are paged only one is looked at, a part at a time."""
    largest = max(p.nbytes for p in q.subject.model.parameters())
    weights = Term("the largest weight", largest) if q.paged else q.whole
    converted = 0 if q.subject.mapped and q.paged else q.subject.file_bytes
    return [
        weights,
        Term("the weight files, which are converted or sent to the GPU", converted, host=True),
        Term("a check of weights", 2 * work.F32 * CHECKED),
    ]


def measure_dense(q: Quantities) -> list[Term]:
    """Perplexity of the dense model, a window at a time."""
    tokens = q.use.length or 0
    return [
        q.weights,
        Term("activations of a window", work.forward(q.subject, tokens), "--eval-length"),
        Term("logits of a window", work.scored(q.subject, tokens), "--eval-length"),
    ]


def write_text(q: Quantities) -> list[Term]:
    """Windows that the model writes, a batch at a time; no mapped block is let go of meanwhile."""
    subject, config, less = q.subject, q.config.self_text, "--self_text.batch"
    batch, tokens = min(config.batch, q.written), q.config.calibration.length + 1
    begun = 1 + (config.prompt if config.windows else 0)
    read = work.forward(subject, batch * begun) + work.scores(subject, batch, begun)
    read += tokens * work.scores(subject, batch, 1)
    return [
        q.weights if q.visits else q.whole,
        Term("keys and values", work.cache(subject, batch, tokens), less),
        Term("keys and values of a block, repeated", work.repeated(subject, batch, tokens), less),
        Term("activations of what a window begins with", read, less),
        Term("logits of a token a window", work.sampled(subject, batch), less),
    ]


def calibrate(q: Quantities) -> list[Term]:
    """A forward pass that keeps the input of each block, and a backward pass a block at a time."""
    subject, config, curvature = q.subject, q.config.calibration, q.config.importance.curvature
    tokens = config.batch * config.length
    own = work.block_activations(subject, q.block, tokens, subject.itemsize)
    own += work.scores(subject, config.batch, config.length)
    return [
        q.weights,
        streams(q, q.streams[0].bytes),
        Term("activations of a block", own, "--calibration.batch"),
        Term("a linear's inputs in float32", work.moments(subject, tokens), "--calibration.batch"),
        statistics(q),
        Term(
            "a decomposition",
            work.decomposition(subject, q.block, curvature),
            curvature_flag(q),
        ),
        Term("logits and their gradient", work.logits(subject, tokens, 3), "--calibration.batch"),
    ]


def statistics(q: Quantities) -> Term:
    """Importances: of the block at work where files keep those of the others, else of all chosen blocks."""
    held = q.subject.chosen if q.config.run.save_every is None else (q.block,)
    curvature = q.config.importance.curvature
    size = sum(work.statistics(q.subject, b, curvature) for b in held)
    name = "statistics of a block" if len(held) == 1 else "statistics of all blocks"
    return Term(name, size, curvature_flag(q))


def curvature_flag(q: Quantities) -> str:
    """The setting that makes correlations smaller, where the method reads it."""
    return "" if "importance.curvature" in method_of(q.config).unused else "--importance.curvature"


def streams(
    q: Quantities, size: int, name: str = "activations between blocks", host: bool = False
) -> Term:
    """Activations that a phase keeps: in memory as far as ``run.activation_memory`` goes."""
    limit = q.config.run.activation_memory
    kept = size if limit is None else min(size, parse_bytes(limit))
    return Term(name, kept, ACTIVATIONS, host)


def choose_ranks(q: Quantities) -> list[Term]:
    """Each group of linears alone binary, against the dense model on a few windows in one pass."""
    subject, config = q.subject, q.config.sensitivity
    windows = min(config.windows, q.config.calibration.windows)
    length = min(config.length, q.config.calibration.length)
    tokens = windows * length
    outputs = len(subject.decoder.blocks) * tokens * subject.hidden * subject.itemsize
    own = work.forward(subject, tokens) + work.scores(subject, windows, length)
    group = [
        *initializer(q),
        Term("binary weights of a group", subject.itemsize * q.block_weights),
        Term("the block after it, on its visit", q.block_bytes(q.block) * q.visits),
    ]
    more = q.rounded * (len(q.storages) > 1) - sum(term.bytes for term in group)
    return [
        q.weights,
        Term("outputs of every block", outputs, "--sensitivity.windows"),
        Term("activations of a block", own, "--sensitivity.windows"),
        Term("logits, dense and binary", work.logits(subject, tokens, 3), "--sensitivity.windows"),
        *group,
        Term("embedding and head, rounded, beyond what a group takes later", max(0, more)),
    ]


def initializer(q: Quantities) -> list[Term]:
    """What is known of a block's linears, and what initializing them works in."""
    curvature = q.config.importance.curvature
    own = work.initializer(q.subject, q.block, q.most, q.config.block, curvature)
    return [
        statistics(q),
        Term("the initializer", own, curvature_flag(q)),
    ]


def blocks(q: Quantities) -> list[Term]:
    """A block from dense to quantized; with epochs it is trained in float32."""
    all_of = work.F32 * q.of_all.weights + q.indices
    own = work.F32 * q.of_block.weights + q.indices_of(q.subject.names(q.block))
    rest = all_of * (q.on_host and q.config.run.save_every is None)
    what = "latents" if q.of_all.latents else "codebooks and indices"
    terms = [q.weights, *initializer(q), Term(what, own if q.on_host else all_of)]
    terms.append(Term(f"{what} of all blocks, which no file keeps", rest, host=True))
    return terms + (tuning(q) if q.config.block.tunes else [])


def tuning(q: Quantities) -> list[Term]:
    """The block in float32, gradients, moments and copies of what trains, and two streams of activations."""
    config = q.config.block
    trained = max(q.block_weights * (config.dense_epochs > 0), q.of_block.weights)
    copies = 4 + 1 + (config.held_out > 0)  # gradient, moments, last good one and the next, best
    tokens = max(config.dense_batch, config.refine_batch) * q.config.calibration.length
    activations = work.block_activations(q.subject, q.block, tokens, q.item)
    return [
        Term("the block in float32, and as it was", 2 * work.F32 * q.numbers, "--preset fast"),
        Term("gradients, moments and copies", copies * work.F32 * trained, "--preset fast"),
        Term("weights in the type of products", q.item * q.numbers, "--preset fast"),
        Term(
            "dense weights that indices follow", work.F32 * q.block_weights * (config.reassign > 0)
        ),
        streams(q, q.streams[1].bytes),
        Term("activations of the block", activations, "--block.dense_batch"),
    ]
