"""How fast a machine works: measured here in a few seconds on shapes of the model that are scaled down, or assumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.estimate.operations import Work, iteration, kmeans
from nanoquant.estimate.quantities import Quantities
from nanoquant.importance import Importance
from nanoquant.product import KMeansInitializer
from nanoquant.product_budget import ProductShape
from nanoquant.second_moment import Correlation

FASTEST, SLOWEST = 0.6, 2.0
"""A phase takes between these times what its work comes to."""
STARTING = 15.0
"""Seconds in which a process imports its libraries and loads a model, at most."""
SECONDS = 0.3
"""Seconds that each measurement takes at least."""
LARGEST_SIDE = 1024
"""Longest side of a linear that is measured."""


@dataclass(frozen=True)
class Rates:
    """Work a second."""

    products: float
    """Operations of matrix products in the model's type."""
    full: float
    """Operations of matrix products in float32."""
    eigen: float
    """n^3 of an eigendecomposition."""
    numbers: float
    """Numbers that are read and written."""
    column: float = 0.0
    """Seconds of each column of a decomposition, where starting its kernels is what takes time."""
    passed: float = 0.0
    """Seconds of each block that a training step runs through, for the same reason."""
    moved: float = 25e9
    """Bytes that come to a GPU, where blocks of the dense model visit it; without a GPU nothing does."""
    initializer: float = 1.0
    """Seconds of the initializer over those of its work."""
    source: str = ""
    """Where they are from."""

    def seconds(self, work: Work) -> float:
        """Time of some work."""
        return (
            work.products / self.products
            + work.full / self.full
            + work.eigen / self.eigen
            + work.numbers / self.numbers
            + work.columns * self.column
            + work.passes * self.passed
        )


ASSUMED = {
    "h100": Rates(
        products=300e12,
        full=40e12,
        eigen=5e10,
        numbers=2.5e11,
        column=2e-5,
        passed=2.5e-3,
        source="assumed for an H100: 300 TFLOP/s in bfloat16, 40 in float32, eigenvectors of 5e10 n^3 a second, 2.5e11 "
        "numbers a second, 25 GB/s from main memory, and, from a model of 135M on an H200, at least 0.02 ms a column "
        "of a decomposition and 2.5 ms a block of a training step",
    )
}
"""Rates of machines that are not here."""


def measure(q: Quantities, device: torch.device) -> Rates:
    """Rates of this machine, on the largest linear of the model scaled down to :data:`LARGEST_SIDE`."""
    shapes = q.subject.shapes
    name = max(shapes, key=lambda n: shapes[n][0] * shapes[n][1])
    scale = min(1.0, LARGEST_SIDE / max(shapes[name]))
    d_out, d_in = (max(8, int(side * scale)) for side in shapes[name])
    x = torch.randn(512, d_in, device=device)
    W = torch.randn(d_out, d_in, device=device)
    half = (x.to(q.subject.model.dtype), W.to(q.subject.model.dtype))
    operations = 2.0 * x.shape[0] * d_out * d_in
    square = W.T @ W / d_out
    many = torch.randn(1 << 22, device=device)
    rates = Rates(
        products=operations / _seconds(lambda: half[0] @ half[1].T, device),
        full=operations / _seconds(lambda: x @ W.T, device),
        eigen=d_in**3 / _seconds(lambda: torch.linalg.eigh(square), device),
        numbers=many.numel() / _seconds(lambda: many.mul_(1.0), device),
        moved=_moved(device),
    )
    size = q.given[name]
    if isinstance(size, ProductShape):
        one, measured = _kmeans(q, W, size)
    else:
        one, measured = _iteration(q, W, square, max(4, int(size * scale)))
    return replace(
        rates,
        initializer=measured / rates.seconds(one),
        source=f"measured on this {device.type}, {torch.get_num_threads()} threads, at up to {d_out} x {d_in}",
    )


def _kmeans(q: Quantities, W: torch.Tensor, shape: ProductShape) -> tuple[Work, float]:
    """Work and seconds of the codebooks of W; of a slab of W's rows, or of what has a group for every entry."""
    g, config = shape.group, q.config.product.kmeans
    one = ProductShape(g, shape.widths)
    if len(W) * one.groups(W.shape[1]) < max(one.entries):
        W = W.new_ones(max(one.entries), g).normal_()
    importance = Importance(W.new_ones(W.shape[1]), W.new_ones(len(W)))
    initializer = KMeansInitializer(config)
    seconds = _seconds(lambda: initializer(W, importance, one), W.device)
    return kmeans(*W.shape, one, config), seconds


def _iteration(
    q: Quantities, W: torch.Tensor, square: torch.Tensor, rank: int
) -> tuple[Work, float]:
    """Work and seconds of an iteration of the initializer on W: of five less those of one, over four."""
    curvature, device = q.config.importance.curvature, W.device
    spread, Q = torch.linalg.eigh(square)
    known = Correlation(Q, spread.clamp_min(1e-6) / spread.mean())
    outputs = torch.linalg.eigh(W @ W.T / W.shape[1])
    importance = Importance(
        torch.ones(W.shape[1], device=device),
        torch.ones(W.shape[0], device=device),
        known if curvature != "diagonal" else None,
        Correlation(outputs[1], outputs[0].clamp_min(1e-6)) if curvature == "both" else None,
    )
    few, more = (ADMMInitializer(ADMMConfig(iterations=k, refit_sweeps=0)) for k in (1, 5))
    least = _seconds(lambda: few(W, importance, rank), device)
    seconds = (_seconds(lambda: more(W, importance, rank), device) - least) / 4
    one = iteration(*W.shape, rank, curvature, q.config.admm.power_iterations)
    return one, max(1e-9, seconds)


def _moved(device: torch.device) -> float:
    """Bytes a second from main memory to a GPU."""
    if device.type != "cuda":
        return Rates.moved
    home = torch.zeros(1 << 24)
    return home.nbytes / _seconds(lambda: home.to(device, copy=True), device)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a call, after one that does not count."""
    function()
    calls, begun, spent = 0, _now(device), 0.0
    while spent < SECONDS:
        function()
        calls += 1
        spent = _now(device) - begun
    return spent / calls


def _now(device: torch.device) -> float:
    """The time when all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
