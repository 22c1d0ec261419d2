"""What a dense teacher says of windows, made once: its most probable tokens and one bucket for all others.

The model runs block by block, so that every weight is read once for all windows of a portion, and is given back
where it is mapped. Shapes: N windows, T tokens a window, d hidden size, k kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from transformers import PreTrainedModel

from nanoquant.decoder import (
    BlockCall,
    Decoder,
    call_block,
    capture_block_inputs,
    evaluation_mode,
    input_device,
    split_output,
)
from nanoquant.dense_prefix import skipped
from nanoquant.divergence import ForwardKL, most_probable
from nanoquant.mapped import forget, paged
from nanoquant.offload import at_work

PORTION = 1 << 28
"""Bytes of hidden states and kept tensors that one pass through the model works on."""
KEPT = ("log_p", "ids", "log_rest")
BATCH = 4
"""Windows that a block runs at once."""


def bytes_a_token(k: int) -> int:
    """What is kept of a token: k log-probabilities and k ids of 4 bytes each, and the logarithm of the bucket."""
    return 8 * k + 4


def as_rows(windows: Tensor | Dataset) -> Dataset:
    """Windows (N, T) as a data set of one (T,) at a time; one that is a data set already stays as it is."""
    return TensorDataset(windows) if isinstance(windows, Tensor) else windows


def collate(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """A batch of rows, which are forgotten where they lie in a file."""
    batch = [torch.stack(column) for column in zip(*rows, strict=True)]
    forget(tensor for row in rows for tensor in row)
    return batch


def portion(model: PreTrainedModel, length: int, k: int) -> int:
    """Windows of ``length`` tokens that one pass works on."""
    width = model.get_input_embeddings().embedding_dim * model.dtype.itemsize
    return max(1, PORTION // (length * (width + bytes_a_token(k))))


@torch.no_grad()
def keep_logits(
    model: PreTrainedModel, decoder: Decoder, windows: Tensor, k: int, precision: str
) -> dict[str, Tensor]:
    """What is kept of the logits of each token.

    Args:
        model: the dense teacher.
        decoder: its blocks.
        windows: token ids (N, T) of one portion.
        k: most probable tokens.
        precision: Lightning precision under which the student trains.

    Returns:
        On the CPU ``log_p`` float32 (N, T, k), ``ids`` int32 (N, T, k) and ``log_rest`` float32 (N, T), see
        :func:`most_probable`.
    """
    device, mixed = input_device(model), precision == "bf16-mixed"
    windows = windows.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed), evaluation_mode(model):
        with paged(decoder.blocks):
            hidden, calls = capture_block_inputs(model, decoder, windows)
        more = _run_blocks(decoder, calls, hidden)
        found = [
            _keep_window(model, decoder, window, state if more is None else (state, *more), k)
            for window, state in zip(windows.split(1), hidden.split(1), strict=True)
        ]
    forget(model.parameters())
    return {
        name: torch.stack(parts).cpu()
        for name, parts in zip(KEPT, zip(*found, strict=True), strict=True)
    }


def _run_blocks(decoder: Decoder, calls: list[BlockCall], hidden: Tensor) -> tuple | None:
    """Run all blocks over hidden states (N, T, d), in place; gives what the last returns beside; None: no tuple."""
    more: tuple | None = None
    for block, call in zip(decoder.blocks, calls, strict=True):
        with at_work(block):
            for part in hidden.split(BATCH):
                states, more = split_output(call_block(block, part, call))
                part.copy_(states)
        forget(block.parameters())
    return more


def _keep_window(
    model: PreTrainedModel,
    decoder: Decoder,
    window: Tensor,
    output: Tensor | tuple,
    k: int,
) -> tuple[Tensor, ...]:
    """What is kept of a window (1, T) whose last block returned ``output``: (T, k), (T, k) and (T,)."""
    with skipped(decoder.blocks, lambda: output):
        logits = model(input_ids=window, use_cache=False).logits[0]
    parts = [most_probable(part, k) for part in logits.split(ForwardKL.chunk)]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
