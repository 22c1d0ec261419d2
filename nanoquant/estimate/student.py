"""Most memory of the whole-model phase, and of what follows it.

Shapes: N windows, T tokens a window, V vocabulary.
"""

from __future__ import annotations

from nanoquant.embedding import PART, PART_BYTES
from nanoquant.estimate import work
from nanoquant.estimate.initialization import CHECKED, streams
from nanoquant.estimate.quantities import Quantities
from nanoquant.estimate.terms import Term
from nanoquant.kept_logits import PORTION, bytes_a_token
from nanoquant.verification import PROMPT, TOKENS
from nanoquant_kernels.product import CHUNK, LARGE_CHUNK

MOMENTS = {32: 8.0, 8: 2 + 2 * 4 / 256, 4: 1 + 2 * 4 / 128}
"""Bytes of the two moments of a number by their bits; torchao adds a scale for 256 or 128 of them."""
COPIES = 3
"""The best state, the last good one, and one of the two that is just made anew."""
VERIFIED = 1 + len(PROMPT) + TOKENS
"""Most tokens that a verification generates and scores; one that is read has a character at least."""
GATHERED = 3
"""Copies of a block's latents at once: gathered, its gradient, and that as it is sent; on a GPU the next block too."""
LOOKED_UP = 24
"""Bytes for each weight that is looked up at a time: two stages, their sum, that with scales, its gradient, numbers."""
COMPILER = 350 * 2**20
"""Bytes that compiling blocks adds to the process."""


def model(q: Quantities) -> list[Term]:
    """Training against the dense model: what trains, its optimizer, its copies, and activations.

    Processes that divide the former hold a part each, and gather a block.
    """
    signs = q.config.model.train == "signs"
    trained = -(-(q.of_all.weights + q.scales if signs else q.scales) // parts(q))
    bits = q.config.model.optimizer.state_bits
    less = "--model.train scales" if signs else ""
    narrower = "--model.optimizer.state_bits 8" if signs and bits == 32 else less
    return [
        q.weights,
        Term("blocks that stay dense, which have settled", (q.kept - q.around) * q.visits),
        *embeddings(q),
        *kept_logits(q),
        streams(q, q.streams[2].bytes * q.recalls, "states of the teacher", host=True),
        Term("what trains, in float32", work.F32 * trained, less),
        Term("gradients", work.F32 * trained, less),
        Term("moments", int(MOMENTS[bits] * trained), narrower),
        Term("the best state, the last good one and the next", COPIES * work.F32 * trained, less),
        *fixed(q, signs),
        *gathered(q, trained),
        *activations(q),
        Term("compiled blocks", COMPILER * compiles(q), "--model.compile_from null", host=True),
    ]


def embeddings(q: Quantities) -> list[Term]:
    """The student's own embedding and head, rounded to tables that wait until the end."""
    largest = max((weight.numel() for weight in q.tabled), default=0)
    return [
        Term("embedding and head, rounded", q.rounded),
        Term("tables of embedding and head", q.tables),
        Term("a part of a table while it is made", PART_BYTES * min(PART, largest)),
    ]


def parts(q: Quantities) -> int:
    """Over how many processes what trains is divided."""
    return q.use.devices if q.config.model.shard else 1


def gathered(q: Quantities, trained: int) -> list[Term]:
    """A block as it is gathered; what whole latents take, before they are divided, beyond what takes their place."""
    if parts(q) == 1:
        return []
    mapped = q.config.run.save_every is not None and q.on_host
    more = max(0, q.of_all.weights - (1 + 2 + COPIES) * trained) * (not mapped)
    ahead = GATHERED + q.use.gpu
    return [
        Term("a block, gathered, and its gradient", work.F32 * ahead * q.of_block.weights),
        Term("latents, whole until they are divided", work.F32 * more, host=q.on_host),
    ]


def compiles(q: Quantities) -> bool:
    """Whether there are enough steps for blocks to be compiled."""
    config = q.config.model
    steps = config.epochs * -(-config.windows // config.batch)
    return config.compile_from is not None and steps >= config.compile_from


def fixed(q: Quantities, signs: bool) -> list[Term]:
    """What does not train and is unpacked for each product: frozen signs, or indices and codebooks at rest."""
    if q.of_all.latents:
        return [] if signs else [Term("signs in bits", q.packed), unpacked(q)]
    still = 0 if signs else work.F32 * q.of_all.entries
    return [Term("indices, and codebooks that do not train", q.indices + still), unpacked(q)]


def unpacked(q: Quantities) -> Term:
    """Signs of the largest linear in the type of products, U and V in turn; or what is looked up at a time."""
    shapes = q.subject.shapes
    if not q.of_all.latents:
        largest = max(d_out * d_in for d_out, d_in in shapes.values())
        chunk = LARGE_CHUNK if q.use.gpu else CHUNK["cpu"]
        return Term("weights that are looked up at a time", LOOKED_UP * min(largest, chunk))
    largest = max(sum(shapes[name]) * rank for name, rank in q.most.items())
    return Term("signs of a linear, unpacked", 2 * q.item * largest)


def kept_logits(q: Quantities) -> list[Term]:
    """What is kept of the teacher's logits: a portion while it is made, and all where no file keeps it."""
    config = q.config.model
    if config.kept_logits is None:
        return []
    tokens = (config.windows + config.held_out) * q.config.calibration.length
    size = tokens * bytes_a_token(config.kept_logits)
    size = size if q.config.run.save_every is None else min(size, 2 * PORTION)
    return [Term("kept logits", size, "--model.kept_logits", host=True)]


def activations(q: Quantities) -> list[Term]:
    """What the student keeps for its backward pass: of all blocks, or of one where blocks run again.

    Processes have a part of each batch.
    """
    subject, config = q.subject, q.config.model
    length, windows = q.config.calibration.length, -(-config.batch // q.use.devices)
    tokens = windows * length
    each = [
        work.quantized_activations(subject, b, q.given, tokens, q.item)
        if b in subject.chosen
        else work.block_activations(subject, b, tokens, q.item)
        for b in range(len(subject.decoder.blocks))
    ]
    signs = q.item * q.of_all.latents if config.train == "signs" else 0
    scores = work.scores(subject, windows, length)
    less = "--model.batch" if config.recompute else "--model.recompute"
    if config.recompute:
        own = max(each) + len(each) * tokens * subject.hidden * q.item
        signs //= len(subject.chosen)
    else:
        own, scores = sum(each), scores * len(each)
    return [
        Term("activations of the student", own + scores, less),
        Term("signs in the type of products", signs, less),
        Term("logits of both and their gradient", work.logits(subject, tokens, 4), "--model.batch"),
    ]


def pack(q: Quantities) -> list[Term]:
    """Packing and writing: signs and scales, once more while they are packed, and what is not quantized."""
    return [
        Term("packed linears", 2 * q.packed),
        Term("what stays dense", q.kept),
        Term("embedding and head", q.around),
        Term("tables of embedding and head", q.tables),
        Term("a check of weights", 2 * work.F32 * CHECKED),
    ]


def measure_fresh(q: Quantities) -> list[Term]:
    """Verification and perplexity of the checkpoint in a process of its own, while this one waits."""
    tokens = max(q.use.length or 0, VERIFIED)
    return [
        Term("the other process with its libraries", q.use.base, host=True),
        Term("the checkpoint, and its files while it loads", 2 * (q.packed + q.kept)),
        unpacked(q),
        Term("activations of a window", work.forward(q.subject, tokens)),
        Term("logits of a window", work.scored(q.subject, tokens), "--eval-length"),
    ]
