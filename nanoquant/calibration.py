"""Calibration: importances of the linears block by block, by one forward and one backward pass (Phase 1).

The forward pass keeps the input of every block, for all windows. The backward pass begins at the logits and goes from
the last block to the first: each runs again, with gradients, and its importances are finished before the next one's
begin. So statistics of one block are in memory at a time, and of mapped weights those of one block. Batches are the
same, in the same order, as in a pass of the whole model, and so are the importances.

Shapes: N windows, B of a batch, T tokens a window, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nanoquant.activation_memory import ActivationMemory
from nanoquant.decoder import Decoder, around_blocks, evaluation_mode, input_device
from nanoquant.heap import give_back
from nanoquant.importance import (
    Importance,
    ImportanceCollector,
    ImportanceConfig,
    cross_entropy_gradient,
)
from nanoquant.mapped import forget
from nanoquant.offload import at_work
from nanoquant.segments import Segments


class BlockwiseCalibration:
    """Importances of one block after the other, from the last to the first.

    Args:
        model: dense causal language model, in float32 or bfloat16.
        decoder: its blocks.
        windows: token ids (N, T), T at least 2.
        config: clipping and shrinkage.
        batch_size: windows a pass; also the unit over which the clipping quantile is taken.
        memory: where block inputs and gradients lie.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        windows: Tensor,
        config: ImportanceConfig,
        batch_size: int = 1,
        memory: ActivationMemory | None = None,
    ) -> None:
        self.model, self.decoder, self.config = model, decoder, config
        self.memory = memory or ActivationMemory()
        self.segments = Segments(model, decoder)
        self.batches = windows.to(input_device(model)).split(batch_size)
        self.windows = len(windows)
        self.inputs: dict[int, Tensor] = {}  # of each block, (N, T, d)
        self.gradient: Tensor | None = None
        """At the input of the block that was done last, (N, T, d)."""

    def __call__(
        self,
        chosen: range,
        keep: Callable[[int, dict[str, Importance]], None],
        advance: Callable[[int], None] = lambda passes: None,
        end: int | None = None,
        gradient: Tensor | None = None,
    ) -> None:
        """Calibrate the chosen blocks, the last of them first.

        No weight receives a gradient; flags, modes and hooks of the model are as before on return.

        Args:
            chosen: blocks whose importances are wanted.
            keep: called with each block from the last one of the model to the first chosen one, and its importances
                by full name; none where it is not chosen.
            advance: called with the passes of a block that were done, :func:`passes` in all.
            end: the block from which on all are done; None: none is.
            gradient: at its input, as :attr:`gradient` was then.

        Raises:
            ValueError: activations or gradients are not finite or all zero; names the block or the linear.
        """
        end = len(self.decoder.blocks) if end is None else end
        for begin, ids in self._parts() if gradient is not None else ():
            part = gradient[begin : begin + len(ids)].to(ids.device)
            self.gradient = self._filled(self.gradient, begin, part)
        with _frozen(self.model), evaluation_mode(self.model):
            self._forward(chosen.start, end, advance)
            for b in reversed(range(chosen.start, end)):
                keep(b, self._backward(b, self.decoder.linears[b] if b in chosen else ()))
                advance(2)

    @torch.no_grad()
    def _forward(self, first: int, end: int, advance: Callable[[int], None]) -> None:
        """Inputs of the blocks from ``first`` to before ``end``, and none of those before."""
        hidden = None
        for begin, ids in self._parts():
            part = self.segments.enter(ids)
            if len(part) != len(ids):
                raise ValueError(
                    f"the blocks of {type(self.model).__name__} take hidden states of shape {tuple(part.shape)} for "
                    f"{len(ids)} windows; allowed are those that begin with the windows"
                )
            hidden = self._filled(hidden, begin, part)
        for b in range(end):
            if b >= first:
                self.inputs[b] = hidden
            if b == end - 1:
                break
            hidden = self._past(b, hidden, hidden if b < first else None)
            self._done_with(b)
            advance(1)

    def _past(self, b: int, hidden: Tensor, following: Tensor | None) -> Tensor:
        """Hidden states (N, T, d) moved past a block, into ``following``, made where it is absent."""
        with at_work(self.decoder.blocks[b]):
            for begin, ids in self._parts():
                part = self.segments(b, ids, hidden[begin : begin + len(ids)])
                if not part.isfinite().all():
                    raise ValueError(
                        f"{self.decoder.path}.{b} gives activations that are not finite (NaN or infinity)"
                    )
                forget([hidden[begin : begin + len(ids)]])
                following = self._filled(following, begin, part)
        return following

    def _backward(self, b: int, names: tuple[str, ...]) -> dict[str, Importance]:
        """Importances of linears of a block; the gradient moves from its output to its input."""
        block, inputs = self.decoder.blocks[b], self.inputs.pop(b)
        linears = {self.decoder.full_name(b, name): block.get_submodule(name) for name in names}
        collector = ImportanceCollector(linears, self.config)
        with at_work(block), torch.enable_grad(), collector:
            for begin, ids in self._parts():
                part = inputs[begin : begin + len(ids)]
                own = self._gradient_at(b, begin, ids, part.detach().requires_grad_())
                self.gradient = self._filled(self.gradient, begin, own)
                forget([part])
        self._done_with(b)
        return collector.importances(release=True)

    def _gradient_at(self, b: int, begin: int, ids: Tensor, hidden: Tensor) -> Tensor:
        """Gradient of the loss at the input of a block (B, T, d), for a batch from that at its output."""
        out = self.segments(b, ids, hidden)
        if b == len(self.decoder.blocks) - 1:
            given = cross_entropy_gradient(out.detach(), ids)
        else:
            given = self.gradient[begin : begin + len(ids)].to(out.device)
        out.backward(given)
        return hidden.grad

    def _parts(self) -> Iterator[tuple[int, Tensor]]:
        """Batches of token ids (B, T), each with the number of its first window."""
        begin = 0
        for ids in self.batches:
            yield begin, ids
            begin += len(ids)

    def _filled(self, whole: Tensor | None, begin: int, part: Tensor) -> Tensor:
        """Write a part (B, T, d), which begins at a window, into the whole (N, T, d), made where it is absent."""
        if whole is None:
            whole = self.memory.empty((self.windows, *part.shape[1:]), part)
        own = whole[begin : begin + len(part)]
        own.copy_(part)
        forget([own])
        return whole

    def _done_with(self, b: int) -> None:
        """Give back what the turn of a block took, and what lies around the blocks."""
        for module in (self.decoder.blocks[b], *around_blocks(self.model)):
            forget(module.parameters())
        give_back()


def passes(blocks: int, first: int) -> int:
    """How often a block runs: forward up to the last, then each down to ``first`` again, forward and backward."""
    return blocks - 1 + 2 * (blocks - first)


def collect_importances(
    model: nn.Module,
    decoder: Decoder,
    windows: Tensor,
    config: ImportanceConfig,
    batch_size: int = 1,
) -> dict[str, Importance]:
    """Importances of the linears of all blocks by full name, in their order; see :class:`BlockwiseCalibration`."""
    found: dict[int, dict[str, Importance]] = {}
    calibration = BlockwiseCalibration(model, decoder, windows, config, batch_size)
    calibration(range(len(decoder.blocks)), found.__setitem__)
    return {full: known for b in sorted(found) for full, known in found[b].items()}


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While active, no parameter wants a gradient."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
