"""The calibration text, cut into the windows of its three uses. Shapes: N windows of T tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanoquant.config import NanoQuantConfig
from nanoquant.data import bos_of, load_tokens, make_windows


@dataclass(frozen=True)
class Text:
    """Windows (N, T) of the three uses; held-out ones come from the end and are used nowhere else."""

    calibration: Tensor
    training: Tensor
    held_out: Tensor


def split_text(
    data: str | Path | Tensor, tokenizer: PreTrainedTokenizerBase | None, config: NanoQuantConfig
) -> Text:
    """Cut the calibration text into distinct windows.

    Args:
        data: a source as in :func:`load_tokens`, or token ids.
        tokenizer: needed for text.
        config: how many windows of which length, and the seed that chooses them.

    Raises:
        ValueError: the text is too short; tells how many tokens there are and how many are needed.
    """
    tokens = load_tokens(data, tokenizer)
    bos = None if tokenizer is None else bos_of(tokenizer)
    length, model = config.calibration.length, config.model
    held = model.held_out if model.train != "none" else 0
    trained = model.windows if model.train != "none" else 0
    tuned = config.block.windows if config.block.tunes else 0
    needed = max(config.calibration.windows, tuned, trained)
    own = length - (bos is not None)  # tokens of the text in a window
    available = len(tokens) // own
    if available < needed + held:
        raise ValueError(
            f"the text has {len(tokens)} tokens, enough for {available} windows of {length}; needed are "
            f"{(needed + held) * own}: {needed} windows for calibration.windows={config.calibration.windows}, "
            f"block.windows={tuned}, model.windows={trained}, and model.held_out={held}; give longer text or fewer"
        )
    windows = make_windows(tokens, length, bos_token_id=bos)
    kept, held_out = windows[: available - held], windows[available - held :]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(config.run.seed))
    kept = kept[order]
    return Text(kept[: max(config.calibration.windows, tuned)], kept[:trained], held_out)
