"""What is compared: linear layers, random weights for them, and the implementations that multiply with these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nanoquant_kernels
from nanoquant.benchmark.timing import AbsentError, Clock, Rotation
from nanoquant.budget import layer_bits
from nanoquant.product_budget import ProductShape, product_bits
from nanoquant_kernels import compiled, cpu, gpu, ops_product, packed_width, product, reference
from nanoquant_kernels.cpu_build import available_paths
from nanoquant_kernels.indices import index_bytes
from nanoquant_kernels.layout import ALIGNMENT

OPERATOR = "operator"
PACKED: dict[str, Callable[..., Tensor]] = {
    OPERATOR: nanoquant_kernels.binary_low_rank_linear,
    "reference": reference.binary_low_rank_linear,
}
"""What is timed, by name: called as (x, u_signs, v_signs, s1, s2, bias, rank). One more is one line more."""
CODEBOOKS = "codebooks"
LOOKED_UP: dict[str, Callable[..., Tensor]] = {
    CODEBOOKS: nanoquant_kernels.product_linear,
    f"{CODEBOOKS}, reference": product.product_linear,
}
"""The same of weights that are looked up: called as (x, indices, codebook, indices2, codebook2, scale, bias)."""
DENSE = "F.linear bf16"
SHARED = f"{OPERATOR}, shared launches"
"""Linears that read the same tensor, launched together, as a packed model on a GPU does."""


@dataclass(frozen=True)
class Linear:
    """A linear layer: d_out, d_in, and at the same bits the rank of its signs and the shape of its codebooks."""

    d_out: int
    d_in: int
    rank: int
    codebooks: ProductShape | None = None
    """None where no codebooks meet the bits."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of signs and scales."""
        return layer_bits(self.d_out, self.d_in, self.rank) // 8

    @property
    def looked_up_bytes(self) -> int:
        """Bytes of indices, codebooks and scales; 0 without codebooks."""
        shape = self.codebooks
        return 0 if shape is None else product_bits(self.d_out, self.d_in, shape) // 8

    @property
    def aligned_bytes(self) -> int:
        """At least the bytes of either packed form, of signs with rows aligned as on a GPU."""
        aligned = self.packed_bytes + ALIGNMENT * (self.d_out + self.rank)
        return max(aligned, self.looked_up_bytes)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the bf16 weight."""
        return 2 * self.d_out * self.d_in

    def weight_bytes(self, name: str) -> int:
        """Bytes of weights that an implementation has to read."""
        if name in LOOKED_UP:
            return self.looked_up_bytes
        return self.dense_bytes if name == DENSE else self.packed_bytes

    def operations(self, name: str, tokens: int) -> int:
        """Floating-point operations of the product as an implementation computes it."""
        factors = self.d_out * self.d_in
        if name != DENSE and name not in LOOKED_UP:
            factors = self.rank * (self.d_out + self.d_in)
        return 2 * tokens * factors


@dataclass
class Bench:
    """What the measurements of linears share: memory, clock, and what was found right already."""

    signs: Rotation
    reals: Rotation
    clock: Clock
    most_error: float
    cache: int | None
    """Bytes of the last cache, None if unknown."""
    errors: dict[tuple, float] = field(default_factory=dict)
    too_slow: dict[tuple, int] = field(default_factory=dict)
    """Implementation and layers to the fewest tokens that took too long."""

    @property
    def device(self) -> torch.device:
        """Where everything lives."""
        return self.signs.memory.device

    def arguments(self, name: str, linear: Linear) -> tuple:
        """Fresh random weights of one layer, as an implementation takes them after x."""
        if name == DENSE:
            return (self.reals.take([linear.d_out, linear.d_in], torch.bfloat16),)
        if name in LOOKED_UP:
            return self._codebooks(linear)
        signs = (self._rows(linear.d_out, linear.rank), self._rows(linear.rank, linear.d_in))
        scales = (self.reals.take([size], torch.bfloat16) for size in (linear.d_out, linear.d_in))
        return (*signs, *scales, None, linear.rank)

    def _codebooks(self, linear: Linear) -> tuple:
        """Random indices and entries."""
        shape, stages = linear.codebooks, []
        for width, entries in zip(shape.widths, shape.entries, strict=True):
            size = [linear.d_out, index_bytes(shape.groups(linear.d_in), width)]
            book = self.reals.take([shape.slabs, entries, shape.group], torch.bfloat16)
            stages += [self.signs.take(size, torch.uint8), book]
        scale = self.reals.take([linear.d_out], torch.bfloat16)
        return (*stages, *[None] * (4 - len(stages)), scale, None)

    def _rows(self, rows: int, columns: int) -> Tensor:
        """Random packed signs, aligned on a GPU as ``prepare_for_decoding`` aligns them, zeros past the last."""
        width = packed_width(columns)
        gap = -width % ALIGNMENT if self.device.type == "cuda" else 0
        packed = self.signs.take([rows, width + gap], torch.uint8)
        if gap:
            packed[:, width:] = 0
        if columns % 8:
            packed[:, width - 1] &= (1 << columns % 8) - 1
        return packed[:, :width]

    def activations(self, tokens: int, width: int) -> Tensor:
        """Random bf16 activations (T, width)."""
        return torch.randn(tokens, width, device=self.device).bfloat16()

    def in_cache(self, reuse_bytes: int) -> bool | None:
        """Whether weights that come again after so many other bytes may still be in a cache."""
        return None if self.cache is None else reuse_bytes < 4 * self.cache


def distinct_linears(linears: dict[str, Linear]) -> dict[Linear, str]:
    """Of every shape (d_out, d_in) the commonest linear, and the names that have the shape: "q_proj, o_proj"."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, linear in linears.items():
        found.setdefault((linear.d_out, linear.d_in), []).append(name)
    commonest = [
        Counter(linears[n] for n in names).most_common(1)[0][0] for names in found.values()
    ]
    kinds = [", ".join(dict.fromkeys(n.rpartition(".")[2] for n in ns)) for ns in found.values()]
    return dict(zip(commonest, kinds, strict=True))


def contestants(linears: Iterable[Linear]) -> list[str]:
    """Implementations that can multiply with all of these: looked-up ones where every linear has codebooks."""
    looked_up = LOOKED_UP if all(linear.codebooks for linear in linears) else ()
    return [DENSE, *PACKED, *looked_up]


def kernel_of(name: str, x: Tensor, linear: Linear, weights: tuple) -> str | None:
    """What runs for this x: a path of the C++ loop, a Triton kernel, "generated" code, or the reference."""
    if name == CODEBOOKS:
        return ops_product.kernel_of(x, *weights)
    if name != OPERATOR:
        return None
    if x.is_cuda:
        return gpu.plan(x.device, x.dtype, len(x), linear.d_out, linear.d_in, linear.rank).kernel
    if cpu.serves(x):
        return available_paths()[-1]
    made = not cpu.exists() and compiled.serves(x, linear.d_out, linear.rank)
    return "generated" if made else "reference"


def function_of(name: str) -> Callable[..., Tensor]:
    """The implementation of a name."""
    return F.linear if name == DENSE else (PACKED | LOOKED_UP)[name]


def run(name: str, *arguments: Any) -> Tensor:  # noqa: ANN401
    """Call an implementation; what it refuses is absent, not an error."""
    return attempt(function_of(name), *arguments)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    """Call a function; what it refuses is absent, not an error."""
    try:
        return function(*arguments)
    except (ValueError, NotImplementedError) as error:
        raise AbsentError(f"refused: {error}") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise AbsentError(f"out of memory: {error}") from error
