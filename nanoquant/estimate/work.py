"""Memory of single steps: what the initializer, a block with gradients, and the logits hold while they run, in bytes.

Shapes: W (d_out, d_in) of rank r, n tokens at once, d hidden size, V vocabulary. Formulas are upper bounds, meant to be
near; tests measure whole phases against their sums.
"""

from __future__ import annotations

from nanoquant.block_config import BlockConfig
from nanoquant.estimate.subject import Subject
from nanoquant.evaluation.perplexity import CHUNK_ELEMENTS
from nanoquant.importance import LOSS_CHUNK
from nanoquant.importance_store import statistics_bytes
from nanoquant.methods import Sizes
from nanoquant.product_budget import ProductShape
from nanoquant.schedules import SCHEDULES

F32 = 4
"""Bytes of a float32, in which the initializer and all training work."""
COPIES = 8
"""Matrices like W that live at once while scales are refitted or the error is measured: W, the weighted W, signs,
their product with scales, three products of these, and a quotient."""
STATES = 3
"""Of each factor: the factor, its proxy, its dual."""
STEPS = 6
"""Tensors like a factor that an update of it makes at once."""
SQUARES = 6
"""Matrices (r, r): the system, its factor or eigenvectors, and what LAPACK works in."""
EIGEN = 7
"""Matrices (d, d) while one correlation is decomposed: the moment, two quotients, eigenvectors, LAPACK's work."""
INDEX = 18
"""Bytes of an index while the error is measured: as it is, int64 for the look-up, and that with the slab's place."""
NORMS = 24
"""Bytes for each hidden channel of a token that two norms in float32 and the sums around them keep."""


def admm(d_out: int, d_in: int, rank: int, members: int = 1) -> int:
    """Initializing ``members`` linears of one shape at once."""
    matrix, factor = d_out * d_in, (d_out + d_in) * rank
    return F32 * members * (COPIES * matrix + (STATES + STEPS) * factor + SQUARES * rank**2)


def admm_metric(d_in: int, d_out: int, curvature: str, members: int = 1) -> int:
    """Copies of the correlations that the initializer takes of ``members`` linears."""
    squares = d_in**2 * (curvature != "diagonal") + d_out**2 * (curvature == "both")
    return F32 * members * squares


def kmeans(d_out: int, d_in: int, shape: ProductShape, members: int = 1) -> int:
    """Codebooks of ``members`` linears, one slab after the other, which takes less than measuring their error.

    Of W in float32 a slab takes five: its groups over their scales, what two stages leave, and entries twice.
    """
    indices = INDEX * d_out * shape.groups(d_in) * len(shape.widths)
    return members * (F32 * COPIES * d_out * d_in + indices)


def initializer(
    subject: Subject, block: int, sizes: Sizes, config: BlockConfig, curvature: str
) -> int:
    """The largest batch of linears that a block initializes at once."""
    groups = tuple(tuple(group) for group in subject.groups(block))
    largest = 0
    for names in SCHEDULES[config.schedule](groups):
        batches: dict[tuple[int, int], list[str]] = {}
        for name in names:
            batches.setdefault(subject.shapes[name], []).append(name)
        for (d_out, d_in), members in batches.items():
            count, given = len(members), [sizes[name] for name in members]
            if isinstance(given[0], ProductShape):
                own = max(kmeans(d_out, d_in, size, count) for size in given)
            else:
                own = admm(d_out, d_in, max(given), count)
                own += admm_metric(d_in, d_out, curvature, count)
            largest = max(largest, own)
    return largest


def statistics(subject: Subject, block: int, curvature: str) -> int:
    """Importances of a block."""
    shapes = [subject.shapes[name] for name in subject.names(block)]
    inputs = [subject.shapes[group[0]][1] for group in subject.groups(block)]
    return statistics_bytes(shapes, inputs, curvature)


def decomposition(subject: Subject, block: int, curvature: str) -> int:
    """Eigenvectors of the largest correlation of a block while they are computed."""
    shapes = subject.shapes
    sides = [shapes[name][1] for name in subject.names(block) if curvature != "diagonal"]
    sides += [shapes[name][0] for name in subject.names(block) if curvature == "both"]
    return F32 * EIGEN * max(sides, default=0) ** 2


def block_activations(subject: Subject, block: int, tokens: int, itemsize: int) -> int:
    """What a dense block keeps for its backward pass: inputs, outputs twice, norms in float32; scores where eager."""
    shapes = subject.all_shapes
    inputs = sum(shapes[group[0]][1] for group in subject.groups(block))
    outputs = sum(shapes[name][0] for name in subject.names(block))
    return tokens * (itemsize * (inputs + 2 * outputs) + NORMS * subject.hidden)


def quantized_activations(
    subject: Subject, block: int, sizes: Sizes, tokens: int, itemsize: int
) -> int:
    """The same of a quantized block: of a linear its input and two outputs.

    Binary ones keep the input times s2, too, and what is between U and V.
    """
    own = 0
    for name in subject.names(block):
        (d_out, d_in), size = subject.shapes[name], sizes[name]
        own += d_in + 2 * d_out + (0 if isinstance(size, ProductShape) else d_in + size)
    return tokens * (itemsize * own + NORMS * subject.hidden)


def scores(subject: Subject, windows: int, length: int) -> int:
    """Attention scores of one block where they are made whole, in the model's type and in float32."""
    if subject.model.config._attn_implementation != "eager":
        return 0
    heads = subject.text_config.num_attention_heads
    return windows * heads * length**2 * (2 * subject.itemsize + F32)


def forward(subject: Subject, tokens: int) -> int:
    """The widest tensors of a pass without gradients: three like the widest linear, four hidden states in float32."""
    widest = max(max(shape) for shape in subject.shapes.values())
    return tokens * (3 * subject.itemsize * widest + 4 * F32 * subject.hidden)


def logits(subject: Subject, tokens: int, copies: int) -> int:
    """``copies`` of the logits of all tokens, and chunks of them in float32."""
    chunk = 4 * F32 * min(tokens, LOSS_CHUNK)
    return subject.vocabulary * (copies * subject.itemsize * tokens + chunk)


def sampled(subject: Subject, windows: int) -> int:
    """Logits of a token a window, of this step and the last one: as they are, and in float32."""
    return 2 * windows * subject.vocabulary * (subject.itemsize + F32)


def cache(subject: Subject, windows: int, tokens: int) -> int:
    """Keys and values of all blocks."""
    kept = sum(b.numbers * min(tokens, b.window or tokens) for b in subject.cached)
    return subject.itemsize * windows * kept


def repeated(subject: Subject, windows: int, tokens: int) -> int:
    """Keys and values of the widest block while each head of queries has its own, or they are put together anew."""
    heads = subject.text_config.num_attention_heads
    widest = max(b.numbers * max(1, heads // b.heads) for b in subject.cached)
    return subject.itemsize * windows * tokens * widest


def scored(subject: Subject, tokens: int) -> int:
    """Logits of a window, and the chunk of them that is scored in float32 at a time."""
    chunk = min(CHUNK_ELEMENTS, tokens * subject.vocabulary)
    return subject.vocabulary * subject.itemsize * tokens + 3 * F32 * chunk


def moments(subject: Subject, tokens: int) -> int:
    """Token vectors of the widest linear in float32 while its statistics grow: as they are, clipped, squared."""
    return 3 * F32 * tokens * max(max(shape) for shape in subject.shapes.values())
