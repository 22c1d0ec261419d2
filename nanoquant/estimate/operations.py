"""How much work each phase is: operations of matrix products, eigendecompositions, passes over numbers.

Of every token a linear of d_out x d_in costs 2 d_out d_in operations forward, as many again for the gradient of its
input, and as many for that of its weight; attention costs 4 T d a block. Reading and writing files is not counted.
Shapes: T tokens a window, d hidden size, W weights of all linears, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanoquant.estimate.quantities import Quantities

PASSES = 25
"""How often a step goes over each trained number: signs, gradient, its norm, AdamW."""
PROXY = 12
"""How often an iteration of the initializer goes over a factor, besides its power iterations."""
REFIT = 10
"""How often a sweep of the refit goes over a matrix."""
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
        full=full, eigen=float(rank**3) * own_metric, numbers=own * rank * (PROXY + 2.0 * power)
    )


def iteration(d_out: int, d_in: int, rank: int, curvature: str, power: int) -> Work:
    """One iteration of the initializer on one linear: both factors."""
    inputs, outputs = curvature != "diagonal", curvature == "both"
    left = update(d_out, d_in, rank, outputs, inputs, power)
    return left + update(d_in, d_out, rank, inputs, outputs, power)


def initializer(q: Quantities, iterations: int) -> Work:
    """All linears once."""
    admm, work = q.config.admm, Work()
    for name, (d_out, d_in) in q.subject.shapes.items():
        rank = q.ranks[name]
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
    """The same of the model whose chosen blocks are binary: 2 r (d_out + d_in) a linear."""
    dense = sum(d_out * d_in for d_out, d_in in q.subject.shapes.values())
    return forward(q, length) + 2.0 * (q.latents - dense)


def phases(q: Quantities, eval_windows: int) -> dict[str, Work]:
    """Work of every phase that takes long, by name."""
    tokens = eval_windows * (q.use.length or 0)
    found = {"calibrate": calibrate(q), "blocks": blocks(q)}
    if tokens:
        found["measure dense"] = Work(products=tokens * forward(q, q.use.length))
    if q.config.budget.allocation == "measured":
        found["ranks"] = ranks(q)
    if q.config.model.train != "none":
        found["model"] = model(q)
    if tokens:
        found["measure in a fresh process"] = Work(
            products=tokens * student_forward(q, q.use.length)
        )
    order = ("measure dense", "calibrate", "ranks", "blocks", "model", "measure in a fresh process")
    return {name: found[name] for name in order if name in found}


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
    tokens = min(config.windows, q.config.calibration.windows) * q.config.calibration.length
    weights = sum(d_out * d_in for d_out, d_in in q.subject.shapes.values())
    rounds = (
        len(q.subject.names(q.block))
        if config.schedule == "published"
        else len(q.subject.groups(q.block))
    )
    rounds = 1 if config.schedule == "algorithm1" else rounds
    epochs = rounds * (config.dense_epochs + config.refine_epochs) + config.joint_epochs
    steps = rounds * config.dense_epochs / config.dense_batch + epochs / config.refine_batch
    passes = tokens / q.config.calibration.length * steps * weights
    return work + Work(products=tokens * weights * (6.0 * epochs + 4.0), numbers=PASSES * passes)


def model(q: Quantities) -> Work:
    """Teacher forward, student forward and backward; looks at held-out windows; steps of the optimizer."""
    config, length = q.config.model, q.config.calibration.length
    own, teacher = student_forward(q, length), forward(q, length)
    windows = config.epochs * config.windows
    looks = config.held_out * (1 + config.evaluations)
    once = config.windows + config.held_out
    taught = once if config.kept_logits is not None else windows + looks
    signs = config.train == "signs"
    times = (3 if signs else 2) + config.recompute
    products = length * (taught * teacher + (windows * times + looks) * own)
    trained = q.latents if signs else q.scales
    unpacked = 0 if signs else q.latents
    steps = windows / config.batch
    return Work(products=products, numbers=steps * (PASSES * trained + 4.0 * unpacked))
