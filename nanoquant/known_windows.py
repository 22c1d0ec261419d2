"""Windows with what is kept of the teacher's logits, portion by portion, so that a killed run makes only the rest."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset
from transformers import PreTrainedModel

from nanoquant.architectures import Decoder
from nanoquant.kept_logits import KEPT, keep_logits, portion
from nanoquant.unfinished import Unfinished


def known_windows(
    teacher: PreTrainedModel,
    decoder: Decoder,
    name: str,
    windows: Tensor,
    k: int,
    precision: str,
    unfinished: Unfinished,
) -> Dataset:
    """Windows (N, T), each with what is kept of the logits of its tokens, see :func:`keep_logits`.

    Args:
        teacher: the dense model.
        decoder: its blocks.
        name: of the windows, for what is kept.
        windows: tokens (N, T).
        k: logits a token.
        precision: Lightning precision of the passes.
        unfinished: keeps each portion, and has those of an earlier run.
    """
    parts = []
    for n, tokens in enumerate(windows.split(portion(teacher, windows.shape[1], k))):
        known = unfinished.keep_logits(
            f"{name}-{n:03}", partial(keep_logits, teacher, decoder, tokens, k, precision)
        )
        parts.append(TensorDataset(tokens, *(known[part] for part in KEPT)))
    return ConcatDataset(parts)
