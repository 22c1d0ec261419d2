"""How much work each phase is: operations of matrix products, eigendecompositions, passes over numbers.

Of every token a linear of d_out x d_in costs 2 d_out d_in operations forward, as many again for the gradient of its
input, and as many for that of its weight; attention costs 4 T d a block. Reading and writing files is not counted.
Shapes: T tokens a window, d hidden size, W weights of all linears, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanoquant.estimate.quantities import Quantities
from nanoquant.kept_logits import portion
from nanoquant.kmeans import START_SAMPLE
from nanoquant.product import EXHAUSTIVE, KMeansConfig
from nanoquant.product_budget import ProductShape
from nanoquant.self_text import PHASE as WRITE_TEXT

PASSES = 25
"""How often a step goes over each trained number: signs, gradient, its norm, AdamW."""
PROXY = 12
"""How often an iteration of the initializer goes over a factor, besides its power iterations."""
REFIT = 10
"""How often a sweep of the refit goes over a matrix."""
POINT = 15
"""How often a round over codebooks goes over each weight: what stages leave, their means, scales."""
LOOK_UP = 6
"""How often a pass goes over each weight that it looks up."""
MOVED = 8
"""Bytes of a number that is read and written."""
LAID_OUT = 2
"""How often a CPU goes over each weight for products of few tokens, besides these: writing text with models of 49M and
135M took 0.6 to 1.3 times what that comes to."""
DRAWN = 10
"""How often drawing a token goes over its logits."""
PROBES = 3
"""Ranks at which errors are measured where ``sensitivity.spread`` is above 0."""


@dataclass(frozen=True)
class Work:
    """Work of a phase."""

    products: float = 0.0
    """Operations of matrix products in the model's type."""
    full: float = 0.0
    """Operations of matrix products in float32."""
    eigen: float = 0.0
    """Sum of n^3 over the eigendecompositions of matrices (n, n)."""
    numbers: float = 0.0
    """Numbers that are read and written one by one."""
    columns: float = 0.0
    """Sum of n over those decompositions, whose columns follow one another."""
    passes: float = 0.0
    """Blocks that steps of the whole-model phase run through, whatever their size."""

    def __add__(self, other: Work) -> Work:
        return Work(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def __mul__(self, times: float) -> Work:
        return Work(*(value * times for value in vars(self).values()))


def update(
    own: int, other: int, rank: int, own_metric: bool, other_metric: bool, power: int
) -> Work:
    """One factor (own, r) in one iteration of the initializer, against the other one's proxy (other, r)."""
    full = 2.0 * other * rank**2 + 2.0 * rank * other * own
    full += 4.0 * other**2 * rank if other_metric else 0.0
    if own_metric:
        full += 4.0 * rank**2 * own + 4.0 * rank * own**2
    else:
        full += rank**3 / 3 + 2.0 * rank**2 * own
    return Work(
        full=full,
        eigen=float(rank**3) * own_metric,
        numbers=own * rank * (PROXY + 2.0 * power),
        columns=float(rank) * own_metric,
    )


def iteration(d_out: int, d_in: int, rank: int, curvature: str, power: int) -> Work:
    """One iteration of the initializer on one linear: both factors."""
    inputs, outputs = curvature != "diagonal", curvature == "both"
    left = update(d_out, d_in, rank, outputs, inputs, power)
    return left + update(d_in, d_out, rank, inputs, outputs, power)


def assigning(points: float, entries: int, group: int) -> Work:
    """The nearest of ``entries`` for every group of weights."""
    return Work(full=4.0 * points * group * entries, numbers=2.0 * points * entries)


def kmeans(d_out: int, d_in: int, shape: ProductShape, config: KMeansConfig) -> Work:
    """Codebooks of one linear: k-means of each stage on a sample, and rounds over all groups."""
    points, g = float(d_out // shape.slabs * shape.groups(d_in)), shape.group
    work = Work()
    for K in shape.entries:
        sample = min(points, config.lloyd.sample * K)
        work += assigning(sample, K, g) * config.lloyd.iterations
        work += Work(numbers=3.0 * K * g * min(points, START_SAMPLE * K))
    chosen = choosing(d_out, d_in, shape, config) * config.rounds
    return work * shape.slabs + chosen + Work(numbers=POINT * d_out * d_in * config.rounds)


def choosing(d_out: int, d_in: int, shape: ProductShape, config: KMeansConfig) -> Work:
    """The nearest entries of all stages for every group of a linear."""
    points, g, pairs = float(d_out * shape.groups(d_in)), shape.group, math.prod(shape.entries)
    if len(shape.entries) == 1 or pairs <= EXHAUSTIVE:
        return assigning(points, pairs, g)
    first, second = shape.entries
    return assigning(points, first, g) + assigning(points, second, g) * config.beam


def initializer(q: Quantities, iterations: int) -> Work:
    """All linears once."""
    admm, work = q.config.admm, Work()
    for name, (d_out, d_in) in q.subject.shapes.items():
        rank = q.given[name]
        if isinstance(rank, ProductShape):
            work += kmeans(d_out, d_in, rank, q.config.product.kmeans)
            continue
        one = iteration(d_out, d_in, rank, q.config.importance.curvature, admm.power_iterations)
        refit = admm.refit_sweeps * (2.0 * d_out * d_in * rank)
        passes = REFIT * (1 + admm.refit_sweeps) * d_out * d_in
        work += one * iterations + Work(full=refit + 2.0 * d_out * d_in * rank, numbers=passes)
    return work


def forward(q: Quantities, length: int, share: float = 1.0) -> float:
    """Operations of the dense model for a token of a window, with a share of its blocks."""
    blocks = q.subject.decoder.linear_modules().values()
    weights = sum(module.weight.numel() for module in blocks)
    attention = 4.0 * length * q.subject.hidden * len(q.subject.decoder.blocks)
    return share * (2.0 * weights + attention) + 2.0 * q.subject.hidden * q.subject.vocabulary


def student_forward(q: Quantities, length: int) -> float:
    """The same of the model whose chosen blocks are quantized: 2 r (d_out + d_in) a binary linear."""
    latents = q.of_all.latents
    return forward(q, length) + 2.0 * (latents - dense_weights(q) if latents else 0)


def dense_weights(q: Quantities) -> int:
    """Weights of the linears to quantize."""
    return sum(d_out * d_in for d_out, d_in in q.subject.shapes.values())


def looked_up(q: Quantities) -> float:
    """Numbers that a pass reads and writes to look all weights up; none of binary linears."""
    return 0.0 if q.of_all.latents else float(LOOK_UP * dense_weights(q))


def phases(q: Quantities, eval_windows: int) -> dict[str, Work]:
    """Work of every phase that takes long, by name."""
    tokens = eval_windows * (q.use.length or 0)
    found = {"calibrate": calibrate(q), "blocks": blocks(q)}
    if tokens:
        found["measure dense"] = Work(products=tokens * forward(q, q.use.length))
    if q.written:
        found[WRITE_TEXT] = write_text(q)
    if q.config.budget.allocation == "measured":
        found["ranks"] = ranks(q)
    if q.config.model.train != "none":
        found["model"] = model(q)
    if tokens:
        found["measure in a fresh process"] = Work(
            products=tokens * student_forward(q, q.use.length),
            numbers=eval_windows * looked_up(q),
        )
    order = ("measure dense", WRITE_TEXT, "calibrate", "ranks", "blocks", "model")
    order += ("measure in a fresh process",)
    return {name: found[name] for name in order if name in found}


def steps_of_text(q: Quantities) -> int:
    """Passes over a token of each window of a batch, in which the model writes text."""
    return -(-q.written // q.config.self_text.batch) * q.config.calibration.length


def write_text(q: Quantities) -> Work:
    """A pass over all weights for a token of each window of a batch; forward alone, a third of a training step."""
    length, steps = q.config.calibration.length, steps_of_text(q)
    tokens, subject = q.written * length, q.subject
    weights = subject.dense_bytes / MOVED if q.use.gpu else LAID_OUT * subject.parameters
    return Work(
        products=tokens * forward(q, length),
        numbers=steps * weights + tokens * DRAWN * subject.vocabulary,
        passes=steps * len(subject.decoder.blocks) / 3,
    )


def calibrate(q: Quantities) -> Work:
    """A pass forward, and another forward and backward to inputs; statistics; eigenvectors of each correlation."""
    config, shapes = q.config.calibration, q.subject.shapes
    curvature = q.config.importance.curvature
    tokens = config.windows * config.length
    sides = []
    for b in q.subject.chosen:
        if curvature != "diagonal":
            sides += [shapes[group[0]][1] for group in q.subject.groups(b)]
        if curvature == "both":
            sides += [shapes[name][0] for name in q.subject.names(b)]
    return Work(
        products=3 * tokens * forward(q, config.length),
        full=2.0 * tokens * sum(side**2 for side in sides),
        eigen=float(sum(side**3 for side in sides)),
        columns=float(sum(sides)),
    )


def ranks(q: Quantities) -> Work:
    """Every linear by a short initializer, and a pass from its block on for every group."""
    config, decoder = q.config.sensitivity, q.subject.decoder
    length = min(config.length, q.config.calibration.length)
    tokens = min(config.windows, q.config.calibration.windows) * length
    total, products = len(decoder.blocks), 0.0
    for b in q.subject.chosen:
        products += len(decoder.groups[b]) * tokens * forward(q, length, (total - b) / total)
    times = PROBES if config.spread else 1
    return initializer(q, config.iterations) * times + Work(products=products)


def blocks(q: Quantities) -> Work:
    """The initializer; with epochs, each round's training of dense weights and latents, and the two streams."""
    config, work = q.config.block, initializer(q, q.config.admm.iterations)
    if not config.tunes:
        return work
    tokens = config.windows * q.config.calibration.length
    weights = dense_weights(q)
    rounds = (
        len(q.subject.names(q.block))
        if config.schedule == "published"
        else len(q.subject.groups(q.block))
    )
    rounds = 1 if config.schedule == "algorithm1" else rounds
    epochs = rounds * (config.dense_epochs + config.refine_epochs) + config.joint_epochs
    steps = rounds * config.dense_epochs / config.dense_batch + epochs / config.refine_batch
    passes = tokens / q.config.calibration.length * steps * weights
    for name, size in q.given.items():
        if isinstance(size, ProductShape) and config.reassign:
            times = config.reassign * ((config.refine_epochs > 0) + (config.joint_epochs > 0))
            work += choosing(*q.subject.shapes[name], size, q.config.product.kmeans) * times
    return work + Work(products=tokens * weights * (6.0 * epochs + 4.0), numbers=PASSES * passes)


def model(q: Quantities) -> Work:
    """Teacher forward, student forward and backward; looks at held-out windows; steps of the optimizer."""
    config, length = q.config.model, q.config.calibration.length
    own, teacher = student_forward(q, length), forward(q, length)
    windows = config.epochs * config.windows
    looks = config.held_out * (1 + config.evaluations)
    asked, once = windows + looks, config.windows + config.held_out
    taught = once if config.kept_logits is not None or q.recalls else asked
    again = (asked - taught) * forward(q, length, 0.0) * q.recalls  # the head alone
    signs = config.train == "signs"
    times = (3 if signs else 2) + config.recompute
    products = length * (taught * teacher + again + (windows * times + looks) * own)
    trained = q.of_all.weights if signs else q.scales
    unpacked = 0.0 if signs else 4.0 * q.of_all.latents
    unpacked += (1 + times) * looked_up(q)  # gradients of inputs and codebooks look up once
    steps = windows / config.batch
    passes = steps * len(q.subject.decoder.blocks)
    return Work(products=products, numbers=steps * (PASSES * trained + unpacked), passes=passes)


def visits(q: Quantities, eval_windows: int) -> dict[str, float]:
    """How often all blocks of the dense model come to a GPU in each phase, where they visit it."""
    config = q.config.model
    found = {
        "measure dense": float(eval_windows),
        WRITE_TEXT: float(steps_of_text(q)),
        "calibrate": 2.0,
        "blocks": 1.0 + q.config.block.tunes,
    }
    decoder, total = q.subject.decoder, len(q.subject.decoder.blocks)
    found["ranks"] = 1.0 + sum(
        len(decoder.groups[b]) * (total - b) / total for b in q.subject.chosen
    )
    looks = config.held_out * (1 + config.evaluations)
    found["model"] = float(config.epochs * -(-config.windows // config.batch) + looks)
    if q.recalls:
        found["model"] = float(-(-config.windows // config.batch) + config.held_out)
    elif config.kept_logits is not None:
        length = q.config.calibration.length
        size = portion(q.subject.model, length, config.kept_logits)
        found["model"] = float(sum(-(-n // size) for n in (config.windows, config.held_out)))
    return found
