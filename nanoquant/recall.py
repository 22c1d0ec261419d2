"""Recall: a dense teacher whose blocks need not run again for a window that it has seen.

What its last block gives is kept, and where the windows of a batch come again only what follows that block runs, the
last norm and the head. What is kept lives as long as the process: a killed run begins with nothing. Not in the paper.
Shapes: B windows of a batch, T tokens a window, d hidden size, N windows in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.activation_memory import ActivationMemory
from nanoquant.compiling import quantized_blocks
from nanoquant.decoder import split_output
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
        windows: different windows that are expected, N, all of one length; others are not kept.
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
        self.kept: Tensor | None = None
        """States (N, T, d)."""
        self.more: tuple | None = None
        """What the last block returns beside its states; None: no tuple."""

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> Any:  # noqa: ANN401
        """What the teacher returns for token ids (B, T); no gradient passes."""
        keys = [window.tobytes() for window in input_ids.cpu().numpy()]
        if not all(key in self.rows for key in keys):
            return self._ask(keys, input_ids, use_cache)
        homes = [self.kept[self.rows[key]] for key in keys]
        states = torch.stack(homes).to(input_ids.device)
        forget(homes)
        output = states if self.more is None else (states, *self.more)
        with skipped(self.blocks, lambda: output):
            return self.teacher(input_ids=input_ids, use_cache=use_cache)

    def _ask(self, keys: list[bytes], input_ids: Tensor, use_cache: bool) -> Any:  # noqa: ANN401
        """The same by all blocks; what the last one gives is kept."""

        def keep(block: nn.Module, args: tuple, output: Any) -> None:  # noqa: ANN401
            states, self.more = split_output(output)
            for key, window in zip(keys, states, strict=True):
                self._keep(key, window)

        handle = self.blocks[-1].register_forward_hook(keep)
        try:
            return self.teacher(input_ids=input_ids, use_cache=use_cache)
        finally:
            handle.remove()

    def _keep(self, key: bytes, states: Tensor) -> None:
        """Keep the states (T, d) of a window, if it is new and expected."""
        if self.kept is None:
            like = states.new_empty(0, device="cpu")
            self.kept = self.memory.empty((self.windows, *states.shape), like)
        row = len(self.rows)
        if key in self.rows or row == self.windows or states.shape != self.kept.shape[1:]:
            return
        self.kept[row] = states
        forget([self.kept[row]])
        self.rows[key] = row
