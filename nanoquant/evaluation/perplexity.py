"""Perplexity of a model on windows of tokens.

It streams: besides the logits of one batch in the model's own dtype, at most a chunk of them
exists in float32. Sums over windows are float64.

Shapes: N windows, T tokens a window, B windows a batch, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nanoquant.decoder import evaluation_mode, input_device, most_positions

CHUNK_ELEMENTS = 16 * 2**20

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Perplexity:
    """Perplexity on a set of windows, with what a paired comparison needs."""

    value: float
    """exp of the mean negative log-likelihood per predicted token."""
    tokens: int
    """Number of predicted tokens, N (T - 1)."""
    windows: int
    """Number of windows, N."""
    nll: Tensor
    """Negative log-likelihood of every window in nats, summed over its tokens (N,), float64."""


def negative_log_likelihood(
    model: nn.Module, windows: Tensor, batch_size: int = 1, progress: Progress | None = None
) -> tuple[Tensor, int]:
    """Negative log-likelihood of every window under the model.

    Args:
        model: Causal language model.
        windows: Token ids (N, T); tokens 1 to T - 1 of each are predicted.
        batch_size: Windows a forward pass.
        progress: Called with (windows done, windows in all) after every pass.

    Returns:
        Sums over the tokens of every window (N,), float64, in nats, and the number of predicted
        tokens of all windows together.

    Raises:
        ValueError: The windows are too short, or the logits are not finite.
    """
    check_windows(windows)
    check_length(model, windows.shape[1])
    sums = []
    for batch in batches(windows, batch_size, progress):
        logits = window_logits(model, batch)
        for row, ids in zip(logits, batch.to(logits.device), strict=True):
            nll = [
                log_sum_exp(chunk, len(sums)) - chunk.gather(1, target[:, None])[:, 0]
                for chunk, target in logit_chunks(row[:-1], ids[1:])
            ]
            sums.append(torch.cat(nll).double().sum().cpu())
    return torch.stack(sums), windows[:, 1:].numel()


def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 1, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of the model on windows (N, T); arguments as ``negative_log_likelihood``."""
    return make_perplexity(*negative_log_likelihood(model, windows, batch_size, progress))


def make_perplexity(nll: Tensor, tokens: int) -> Perplexity:
    """Perplexity from the sums of windows (N,) and the number of predicted tokens of all."""
    mean = nll.sum().item() / tokens
    # above exp(709) a float64 overflows
    value = math.exp(mean) if mean < 709 else math.inf
    return Perplexity(value=value, tokens=tokens, windows=len(nll), nll=nll)


def check_length(model: nn.Module, length: int) -> None:
    """Refuse windows that are longer than the positions the model was made for.

    Raises:
        ValueError: tells both.
    """
    positions = most_positions(model)
    if positions is not None and length > positions:
        raise ValueError(
            f"windows of {length} tokens are longer than the model's {positions} positions; ask for shorter ones"
        )


def check_windows(windows: Tensor) -> None:
    """Check the shape of the windows."""
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(windows.shape)}; allowed: (N >= 1, T >= 2)")


def batches(windows: Tensor, batch_size: int, progress: Progress | None) -> Iterator[Tensor]:
    """Yield batches of windows, and report each once it has been used."""
    done = 0
    for batch in windows.split(batch_size):
        yield batch
        done += len(batch)
        if progress:
            progress(done, len(windows))


@torch.no_grad()
def window_logits(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits (B, T, V) in the dtype of the model."""
    with evaluation_mode(model):
        return model(input_ids=batch.to(input_device(model)), use_cache=False).logits


def logit_chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of logits (T, V) in chunks, with the same rows of other tensors; what has V columns as float32."""
    share = CHUNK_ELEMENTS // sum(x.ndim > 1 for x in (logits, *others))
    rows = max(1, share // logits.shape[-1])
    for chunk in zip(*(x.split(rows) for x in (logits, *others)), strict=True):
        yield tuple(x.float() if x.ndim > 1 else x for x in chunk)


def log_sum_exp(logits: Tensor, window: int) -> Tensor:
    """Logarithm of the normaliser of every row (chunk,); not finite if a logit is NaN or +inf."""
    result = logits.logsumexp(-1)
    if not result.isfinite().all():
        raise ValueError(f"the logits of the model are not finite in window {window}")
    return result
