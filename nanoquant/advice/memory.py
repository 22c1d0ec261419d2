"""What a model takes while it runs: weights exactly, the cache exactly, activations by an estimate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nanoquant.advice.anatomy import Anatomy
from nanoquant.advice.config import Use
from nanoquant.advice.options import BF16, Option, our_sizes, weight_bytes
from nanoquant.methods import Size
from nanoquant.product_budget import ProductShape
from nanoquant_kernels.product import CHUNK, LARGE_CHUNK

COMFORT = 0.9
"""Share of the memory up to which a total counts as fitting with room: the rest is for what is not counted."""
SCRATCH = 100 * 2**20
"""Most bytes of unpacked signs at a time on a GPU."""
LOOKED_UP = 18
"""Bytes for each weight that is looked up at a time: two stages, their sum, that with scales, and in its type."""


@dataclass(frozen=True)
class Cost:
    """Bytes of a model under an option."""

    weights: int
    """Stored tensors; exact."""
    cache: int
    """Keys and values at full context; exact for transformers' own cache."""
    activations: int
    """Largest intermediate results while the whole context is read at once; an estimate."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.cache + self.activations

    def fits(self, memory: int) -> str:
        """Whether it goes into the memory: "yes", "tight" where less than a tenth is left over, "no"."""
        if self.total > memory:
            return "no"
        return "yes" if self.total <= COMFORT * memory else "tight"


def cache_bytes(model: Anatomy, use: Use, context: int | None = None) -> int:
    """Bytes of keys and values of every layer at full context, at most its window of a sliding layer."""
    tokens = use.context if context is None else context
    entries = sum(layer.entries * min(tokens, layer.window or tokens) for layer in model.cache)
    return math.ceil(use.batch * entries * use.cache_bits / 8)


def activation_bytes(
    model: Anatomy,
    option: Option,
    use: Use,
    context: int | None = None,
    layers: Iterable[tuple[tuple[int, int], Size]] | None = None,
) -> int:
    """Estimated peak of what a forward pass over the whole context holds besides weights and cache.

    Of each token: two hidden states and one in float32 for a norm, and three vectors as long as the
    widest linear (gate, its activation and up). Then logits of the last token, in bf16 and float32.
    Packed layers, (d_out, d_in) with their sizes or at equal bits, unpack signs or look weights up of one
    linear for many tokens; attention over blocks is assumed.
    Against the allocations of SmolLM2-135M on a CPU, 512 to 2048 tokens, it was 0.99 to 1.15 times.
    """
    tokens = use.batch * (use.context if context is None else context)
    peak = tokens * (BF16 * (2 * model.hidden + 3 * model.widest) + 4 * model.hidden)
    peak += use.batch * model.vocabulary * (BF16 + 4)
    if option.tool == "nanoquant":
        if layers is None:
            sizes = our_sizes(model, option.bits, option.method)
            layers = ((model.linears[name], size) for name, size in sizes.items())
        peak += max(_unpacked(*shape, size, use.device) for shape, size in layers)
    return peak


def _unpacked(d_out: int, d_in: int, size: Size, device: str) -> int:
    """Bytes in which a packed linear is made dense, a part at a time."""
    if isinstance(size, ProductShape):
        return LOOKED_UP * min(d_out * d_in, CHUNK.get(device, LARGE_CHUNK))
    widest = max(min(d_out, d_in), size) * max(d_out, d_in) * BF16
    return widest if device == "cpu" else min(widest, SCRATCH)


def cost(model: Anatomy, option: Option, use: Use) -> Cost:
    """What a model takes under an option.

    Raises:
        ValueError: the option does not go with its shapes.
    """
    return Cost(
        weight_bytes(model, option, use.device),
        cache_bytes(model, use),
        activation_bytes(model, option, use),
    )


def longest_context(model: Anatomy, option: Option, use: Use, memory: int) -> int:
    """Most tokens of context with which an option fits in the memory; 0 where not even one does."""
    weights = weight_bytes(model, option, use.device)
    low, high = 0, model.positions or use.context
    while low < high:
        middle = (low + high + 1) // 2
        needed = cache_bytes(model, use, middle) + activation_bytes(model, option, use, middle)
        low, high = (middle, high) if weights + needed <= memory else (low, middle - 1)
    return low
