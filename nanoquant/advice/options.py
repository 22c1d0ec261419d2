"""The ways to store a model, and the bytes of each: ours by our own budget, others by the layout of their library.

Only the linears of the decoder blocks are quantized, as the libraries do it by default; embedding and head too where an
option says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from nanoquant.advice.anatomy import Anatomy
from nanoquant.budget import BudgetConfig, allocate_ranks
from nanoquant.embedding import EmbeddingConfig, check_width, table_bytes
from nanoquant.methods import Sizes, stored_bits
from nanoquant.product_budget import plan_product

BF16 = 2
"""Bytes of a bf16 number."""
TILE = 1024
"""torchao's int4 layout for GPUs fills rows up to a multiple of this, and their number to a multiple of 8."""
CODEBOOK = 2**16 * 8 * 2
"""Bytes of a codebook of AQLM's scheme 1x16: 2^16 vectors of 8 numbers of 2 bytes."""


@dataclass(frozen=True)
class Option:
    """A way to store a model."""

    key: str
    """Short name, "int4-g64"; with published figures it is the key."""
    label: str
    """As tables show it."""
    bits: float
    """Nominal bits of a weight of the linears."""
    tool: str
    """Who does it: transformers, torchao, gptq, aqlm or nanoquant."""
    group: int = 0
    """Weights that share a scale; 0 where rows do, or none."""
    embedding: int = 16
    """Bits of embedding and head."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it runs."""
    method: str = "binary"
    """Of this library: binary or product."""

    @property
    def name(self) -> str:
        """Label with the bits of the embedding where they are fewer than 16."""
        return self.label if self.embedding == 16 else f"{self.label}, embedding {self.embedding}"


DENSE = Option("bf16", "bf16", 16, "transformers")
OTHERS = (
    DENSE,
    Option("int8", "int8", 8, "torchao"),
    Option("int4-g64", "int4, groups of 64", 4, "torchao", 64),
    Option("int4-g128", "int4, groups of 128", 4, "torchao", 128),
    Option("aqlm", "2 bit, AQLM+PV", 2, "aqlm", 8, devices=("cuda",)),
    Option("2-bit", "2 bit, GPTQ groups of 64", 2, "gptq", 64),
)
"""What other libraries offer, most bits first."""
SIGNS = tuple(
    Option(f"{bits}", f"nanoquant {bits} bit", bits, "nanoquant", 0, embedding)
    for bits in (2.0, 1.0, 0.8, 0.55)
    for embedding in (16, 8, 4)
)
LOOKED_UP = tuple(
    Option(
        f"{bits} codebooks", f"nanoquant {bits} bit, codebooks", bits, "nanoquant", method="product"
    )
    for bits in (2.0, 1.0)
)
OURS = SIGNS + LOOKED_UP
"""What this library makes."""
LEAST_CAREFUL_BITS = 4
"""Fewest bits of a weight at which published work calls the loss small for most tasks."""


def weight_bytes(model: Anatomy, option: Option, device: str) -> int:
    """Bytes of the stored tensors of a model under an option.

    Args:
        model: shapes.
        option: what is asked.
        device: "cpu" or "cuda"; torchao lays int4 out differently on each.

    Raises:
        ValueError: the option does not go with these shapes.
    """
    kept = model.dense_bytes - BF16 * model.body_weights
    if option.tool == "nanoquant":
        return kept + _our_bytes(model, option) + _table_change(model, option.embedding)
    return kept + sum(
        count * _linear_bytes(*shape, option, device) for shape, count in model.shapes.items()
    )


def dense_linears(model: Anatomy, option: Option) -> int:
    """How many linears an option leaves in bf16 because its groups do not divide their rows."""
    if not option.group:
        return 0
    return sum(count for (_, d_in), count in model.shapes.items() if d_in % option.group)


@functools.lru_cache(maxsize=64)
def our_sizes(model: Anatomy, bits: float, method: str = "binary") -> Sizes:
    """Rank of each linear, or its codebooks, as ``nanoquant quantize --bits`` chooses them.

    Raises:
        ValueError: these shapes can't meet the bits.
    """
    if method == "product":
        return dict(plan_product(model.linears, bits))
    return dict(allocate_ranks(model.linears, BudgetConfig(bits=bits)))


def _our_bytes(model: Anatomy, option: Option) -> int:
    """Bytes of signs or indices, codebooks and scales of all linears."""
    sizes = our_sizes(model, option.bits, option.method)
    return sum(stored_bits(model.linears[name], size) for name, size in sizes.items()) // 8


def _table_change(model: Anatomy, bits: int) -> int:
    """Bytes that embedding and head take more than in bf16 when they are stored at 8 or 4 bits."""
    if bits == 16:
        return 0
    import torch

    config = EmbeddingConfig(bits=bits)
    change = 0
    for rows, columns in model.tables:
        check_width(columns, config)
        change += table_bytes(rows, columns, config, torch.bfloat16) - BF16 * rows * columns
    return change


def _linear_bytes(d_out: int, d_in: int, option: Option, device: str) -> int:
    """Bytes of one linear in the layout of another library."""
    weights = d_out * d_in
    if option.key == "bf16" or (option.group and d_in % option.group):
        return BF16 * weights
    if option.key == "int8":  # per row a float32 scale and an int8 zero point
        return weights + d_out * 5
    if option.key == "aqlm":  # per 8 weights a code of 16 bits, per row a scale
        return weights // 4 + CODEBOOK + BF16 * d_out
    if (
        option.key == "2-bit"
    ):  # per group a 16 bit scale and a 2 bit zero point, per column its group
        return weights // 4 + weights // option.group * 18 // 8 + 4 * d_in
    if device == "cuda":
        d_out, d_in = _up(d_out, 8), _up(d_in, TILE)
    return d_out * d_in // 2 + d_out * d_in // option.group * 2 * BF16  # scale and zero point


def _up(value: int, multiple: int) -> int:
    """The value rounded up."""
    return -(-value // multiple) * multiple
