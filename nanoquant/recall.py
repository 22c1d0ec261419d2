"""Recall: a dense teacher whose blocks run once for each window, however often it is asked.

What its last block gives is kept, and where the window comes again only what follows that block runs, the last norm
and the head. One window runs at a time, so that what is kept depends neither on the company of a batch nor on where a
killed run goes on. Shapes: B windows of a batch, T tokens a window, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.activation_memory import ActivationMemory
from nanoquant.compiling import quantized_blocks
from nanoquant.decoder import StopForwardError
from nanoquant.dense_prefix import skipped
from nanoquant.mapped import forget


def recalling(
    teacher: nn.Module, student: nn.Module, windows: int, memory: ActivationMemory | None = None
) -> Recall | nn.Module:
    """A teacher that recalls, or as it is where the student's quantized blocks are in no list, or in several.

    Args:
        teacher: dense; its blocks have the names of the student's.
        student: with quantized layers.
        windows: see :class:`Recall`.
        memory: the same.
    """
    quantized = quantized_blocks(student)
    names = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.ModuleList) and any(block in quantized for block in module)
    ]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    if len(outer) != 1:
        return teacher
    return Recall(teacher, teacher.get_submodule(outer[0]), windows, memory)


class Recall:
    """Answers token ids as the teacher does, from what it has said before where it can.

    Args:
        teacher: dense causal language model.
        blocks: its decoder blocks, in order.
        windows: different windows that are expected; what comes beyond them is not kept.
        memory: where the states lie, on the CPU.
    """

    def __init__(
        self,
        teacher: nn.Module,
        blocks: Sequence[nn.Module],
        windows: int,
        memory: ActivationMemory | None = None,
    ) -> None:
        self.teacher, self.blocks, self.windows = teacher, blocks, windows
        self.memory = memory or ActivationMemory()
        self.rows: dict[bytes, int] = {}
        """Where the states of a window are, by its tokens."""
        self.kept: dict[int, Tensor] = {}
        """States (N, T, d) by T."""
        self.more: tuple | None = None
        """What the last block returns beside its states; None: no tuple."""

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:  # noqa: ANN401
        """What the teacher returns for token ids (B, T); no gradient passes."""
        states = torch.cat([self._states(window) for window in input_ids.split(1)])
        output = states if self.more is None else (states, *self.more)
        with skipped(self.blocks, lambda: output):
            return self.teacher(input_ids=input_ids, use_cache=use_cache)

    def _states(self, window: Tensor) -> Tensor:
        """Output (1, T, d) of the last block for token ids (1, T), on their device."""
        key = window.numpy(force=True).tobytes()
        row = self.rows.get(key)
        if row is not None:
            home = self.kept[window.shape[1]][row : row + 1]
            found = home.to(window.device, copy=True)
            forget([home])
            return found
        states = self._run(window)
        row = len(self.rows)
        if row < self.windows:
            home = self.kept.get(window.shape[1])
            if home is None:
                shape = (self.windows, *states.shape[1:])
                home = self.memory.empty(shape, states.new_empty(0, device="cpu"))
                self.kept[window.shape[1]] = home
            home[row] = states[0]
            forget([home[row]])
            self.rows[key] = row
        return states

    def _run(self, window: Tensor) -> Tensor:
        """The same, by all blocks."""
        found: list[Any] = []

        def stop(block: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401
            found.append(output)
            raise StopForwardError

        handle = self.blocks[-1].register_forward_hook(stop)
        try:
            with contextlib.suppress(StopForwardError):
                self.teacher(input_ids=window, use_cache=False)
        finally:
            handle.remove()
        (output,) = found
        states, self.more = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        return states
