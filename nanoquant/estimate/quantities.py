"""Quantities of a run that several phases refer to: weights, latents, streams, in bytes or numbers.

Shapes: N windows, T tokens a window, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from nanoquant.config import NanoQuantConfig
from nanoquant.disk import Streams, streams
from nanoquant.embedding import EmbeddingConfig, table_bytes
from nanoquant.estimate.subject import Subject
from nanoquant.estimate.terms import Term, Use
from nanoquant.file_budget import embedding_weights
from nanoquant.methods import Sizes, Trained, stored_bits, trained_numbers
from nanoquant.sizes import tensor_bytes
from nanoquant.text_plan import Needs

F16 = 2
"""Bytes of a stored scale, and of an entry of a codebook."""


@dataclass(frozen=True)
class Quantities:
    """A run, and what follows from its shapes."""

    subject: Subject
    """The model."""
    config: NanoQuantConfig
    """Of the run; bits and storage of the embedding are numbers."""
    given: Sizes
    """Ranks at equal bits, which together take as much as any others that meet the bits; or codebooks."""
    most: Sizes
    """Largest rank that each linear may get; or its codebooks."""
    use: Use
    """How the command runs."""
    storages: tuple[EmbeddingConfig, ...]
    """Of embedding and head: those that losses choose from, or the one of ``config`` alone."""

    @cached_property
    def block(self) -> int:
        """The chosen block with most weights."""
        return max(self.subject.chosen, key=lambda b: self.block_bytes(b))

    def block_bytes(self, block: int) -> int:
        """Bytes of a block."""
        return tensor_bytes(self.subject.decoder.blocks[block].parameters())

    @cached_property
    def around(self) -> int:
        """Bytes around the blocks: embedding, head, last norm."""
        blocks = range(len(self.subject.decoder.blocks))
        return self.subject.dense_bytes - sum(self.block_bytes(b) for b in blocks)

    @cached_property
    def kept(self) -> int:
        """Bytes of what stays dense: all but the linears of the chosen blocks."""
        body = sum(d_out * d_in for d_out, d_in in self.subject.shapes.values())
        return self.subject.dense_bytes - self.subject.itemsize * body

    @property
    def paged(self) -> bool:
        """Whether weights come to where they are used a block at a time."""
        return self.config.run.offload if self.use.gpu else self.subject.mapped

    @property
    def on_host(self) -> bool:
        """Whether blocks lie in main memory, or in files, while others are at work."""
        return not self.use.gpu or self.config.run.offload

    @property
    def visits(self) -> bool:
        """Whether blocks visit a GPU."""
        return self.use.gpu and self.config.run.offload

    @property
    def at_home(self) -> int:
        """Bytes of dense weights in main memory while blocks visit a GPU: of one on its way, of all if not mapped."""
        if not self.visits:
            return 0
        return self.block_bytes(self.block) if self.subject.mapped else self.subject.dense_bytes

    @property
    def whole(self) -> Term:
        """All dense weights."""
        return Term("the dense model", self.subject.dense_bytes)

    @property
    def weights(self) -> Term:
        """Dense weights in memory: all, or where they are paged a block and what is around the blocks."""
        if not self.paged:
            return self.whole
        size = self.block_bytes(self.block) + self.around
        return Term("dense weights of a block, embedding and head", size)

    @cached_property
    def numbers(self) -> int:
        """Numbers of the parameters of the block."""
        block = self.subject.decoder.blocks[self.block]
        return sum(p.numel() for p in block.parameters())

    @cached_property
    def block_weights(self) -> int:
        """Weights of the linears of the block."""
        shapes = self.subject.shapes
        return sum(shapes[n][0] * shapes[n][1] for n in self.subject.names(self.block))

    @cached_property
    def of_block(self) -> Trained:
        """What may train of the block, at the largest ranks."""
        chosen = {name: self.most[name] for name in self.subject.names(self.block)}
        return trained_numbers(self.subject.shapes, chosen)

    @cached_property
    def of_all(self) -> Trained:
        """What may train of all linears."""
        return trained_numbers(self.subject.shapes, self.given)

    @cached_property
    def indices(self) -> int:
        """Bytes of the packed indices of all linears; 0 of binary ones, whose signs follow from latents."""
        return self.indices_of(self.given)

    def indices_of(self, names: Iterable[str]) -> int:
        """The same of some linears."""
        sizes, shapes = {name: self.given[name] for name in names}, self.subject.shapes
        of_these = trained_numbers(shapes, sizes)
        bits = sum(stored_bits(shapes[name], size) for name, size in sizes.items())
        return 0 if of_these.latents else bits // 8 - F16 * (of_these.entries + of_these.scales)

    @cached_property
    def scales(self) -> int:
        """Scales of all linears; norms and biases are few beside them, and counted as as many again."""
        return 2 * self.of_all.scales

    @cached_property
    def packed(self) -> int:
        """Bytes of packed signs or indices, codebooks and scales."""
        shapes = self.subject.shapes
        return sum(stored_bits(shapes[name], size) for name, size in self.given.items()) // 8

    @property
    def item(self) -> int:
        """Bytes of a number in products of trained layers."""
        full = self.subject.itemsize == 4 or self.config.run.precision == "32-true"
        return 4 if full else 2

    @property
    def recalls(self) -> bool:
        """Whether states of the teacher are kept, which one process alone does."""
        return self.config.model.recalls and self.use.devices == 1

    @cached_property
    def written(self) -> int:
        """Windows that the model writes for itself; where it writes one text of several, at most."""
        needs = Needs.of(self.config)
        return self.config.self_text.windows + self.use.writes * (needs.kept + needs.held_out)

    @cached_property
    def tabled(self) -> list[Tensor]:
        """Weights of embedding and head, once where they are tied, that may get tables; none at 16 bits."""
        packed = any(storage.bits != 16 for storage in self.storages)
        return embedding_weights(self.subject.model) if packed else []

    @cached_property
    def rounded(self) -> int:
        """Bytes of embedding and head in memory of their own, with the values of their tables."""
        return tensor_bytes(self.tabled)

    @cached_property
    def tables(self) -> int:
        """Bytes of these tables, under the storage that takes most."""
        sizes = [
            sum(table_bytes(*weight.shape, storage, weight.dtype) for weight in self.tabled)
            for storage in self.storages
            if storage.bits != 16
        ]
        return max(sizes, default=0)

    @cached_property
    def streams(self) -> tuple[Streams, Streams, Streams]:
        """Activations between blocks: of calibration, of blocks that are tuned, and of the teacher's last block."""
        subject = self.subject
        return streams(subject.model, len(subject.decoder.blocks), subject.chosen, self.config)
