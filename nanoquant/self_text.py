"""SelfText: windows of text that the dense model writes itself, where the user's own text is short or absent.

Every window has random numbers of its own, from the seed and its number, and every finished batch is written to
the file: a killed run goes on there, and other runs with the same settings read it. Deviation from the paper,
which takes text only.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.data import FILE_SUFFIXES, bos_of
from nanoquant.digest import model_digest
from nanoquant.generation_settings import end_tokens
from nanoquant.mapped import forget
from nanoquant.progress import Progress
from nanoquant.sampling import Sampling, sample
from nanoquant.tensor_file import TensorFile

PHASE = "write text"
"""Name of the phase for those who follow."""
PREFIX, SUFFIX = "self_text", ".safetensors"


@dataclass(frozen=True, kw_only=True)
class SelfTextConfig:
    """Text that the dense model writes itself."""

    windows: int = 0
    """Windows that the model writes for its reconstruction, besides model.windows of the text; each goes on from
    the beginning of a window of the text."""
    prompt: int = 32
    """Tokens of that beginning; with text "self" a window begins with the model's own first token instead."""
    temperature: float = 1.0
    """Temperature at which tokens are drawn; at 0.8 a model of 135M gave perplexity 7.6 to what it wrote, at 1 38.5,
    where real text has 27.4."""
    first: int = 100
    """Without a beginning, the first token is drawn evenly from this many most probable ones."""
    batch: int = 32
    """Windows written at a time; the keys and values of all of them are in memory."""

    def __post_init__(self) -> None:
        if self.windows < 0 or min(self.prompt, self.first, self.batch) < 1:
            raise ValueError(
                "windows must be at least 0, prompt, first and batch at least 1, got "
                f"{self.windows}, {self.prompt}, {self.first} and {self.batch}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


def window_file(place: str | Path | None, settings: dict[str, str]) -> TensorFile:
    """File of windows (n, T), int32.

    Args:
        place: a .safetensors file, or a folder that takes one named after the settings; None keeps nothing.
        settings: everything that decides what the windows are.
    """
    path = None
    if place is not None:
        check_place(place)
        digest = _digest(json.dumps(settings, sort_keys=True).encode())[:8]
        place = Path(place)
        path = place if place.suffix == SUFFIX else place / f"{PREFIX}-{digest}{SUFFIX}"
    return TensorFile(path, settings, "windows")


def check_place(place: str | Path) -> None:
    """Refuse what is neither a .safetensors file nor a folder, there or to be made.

    Raises:
        ValueError: names it.
    """
    path = Path(place)
    file = path.is_file() or (path.suffix in FILE_SUFFIXES and not path.exists())
    if file != (path.suffix == SUFFIX):
        raise ValueError(
            f"{place} must be a .safetensors file or a folder, which keeps written text"
        )


class SelfText:
    """Lets a model write windows.

    Args:
        model: the dense model.
        tokenizer: of the model; without it windows have no BOS, and any id of the model may come.
        config: temperature, beginnings, batch.
        seed: of the random numbers.
        file: file or folder that keeps the windows, see :func:`window_file`.
        progress: told about the phase, in tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: SelfTextConfig,
        seed: int = 0,
        file: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.config, self.seed, self.file = model, config, seed, file
        self.progress = progress or Progress()
        self.bos = None if tokenizer is None else bos_of(tokenizer)
        limit = model.get_input_embeddings().num_embeddings
        self.known = limit if tokenizer is None else min(limit, len(tokenizer))
        ends = end_tokens(model.generation_config)
        self.ends = tuple(sorted(end for end in ends if end < self.known))  # others never come

    def __call__(self, count: int, length: int, pool: Tensor | None = None) -> Tensor:
        """Write windows, or read those that the file has.

        Args:
            count: number of windows, N.
            length: tokens of a window, T, without the BOS that comes in front later.
            pool: beginnings (n, P) that windows take in turn; None to begin with nothing.

        Returns:
            Token ids (N, T), int64.

        Raises:
            ValueError: the file holds something else.
            FloatingPointError: the model's logits are not finite.
        """
        config = self.config
        file = window_file(self.file, self._settings(length, pool))
        kept = file.read()
        rows = [] if kept is None else [kept.tensors["tokens"][:count]]
        begun = 0 if kept is None else len(rows[0])
        begin = 0 if pool is None else pool.shape[1]
        with self.progress.phase(PHASE, (count - begun) * (length - begin)):
            for start in range(begun, count, config.batch):
                numbers = range(start, min(start + config.batch, count))
                rows.append(self._write(numbers, length, pool).int())
                file.write({"tokens": torch.cat(rows)})
        forget(self.model.parameters())
        return torch.cat(rows).long()

    def _write(self, numbers: range, length: int, pool: Tensor | None) -> Tensor:
        """Windows (B, T) of these numbers."""
        head = torch.empty(len(numbers), 0, dtype=torch.long)
        if pool is not None:
            head = pool[torch.tensor(numbers) % len(pool)].long()  # (B, P)
        new = length - head.shape[1]
        seeds = ((self.seed * 1_000_003 + n) % 2**63 for n in numbers)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        chances = torch.stack([torch.rand(new + 1, generator=draw) for draw in draws])
        given = self._context(chances[:, 0], head)
        how = Sampling(
            temperature=self.config.temperature,
            ends=self.ends,
            begin=self.bos if self.ends else None,
            first=0 if pool is not None else self.config.first,
            known=self.known,
        )
        clock = _Clock(self.progress)
        return torch.cat([head, sample(self.model, given, chances[:, 1:], how, clock)], 1)

    def _context(self, chance: Tensor, head: Tensor) -> Tensor:
        """What the model reads before it writes (B, C): the BOS of every window and its beginning.

        Without a beginning a window follows BOS, or an end, or where there is neither one random token.
        """
        if self.bos is not None:
            return torch.cat([torch.full((len(head), 1), self.bos), head], 1)
        if head.shape[1]:
            return head
        begin = self.model.generation_config.bos_token_id
        begin = begin if begin is not None or not self.ends else self.ends[0]
        if begin is not None:
            return torch.full((len(head), 1), begin)
        return (chance * self.known).long()[:, None]

    def _settings(self, length: int, pool: Tensor | None) -> dict[str, str]:
        """What decides the windows, as text."""
        used = pool is not None
        return _common(self.model, self.config, self.seed, length) | {
            "first": "" if used else str(self.config.first),
            "beginnings": f"{pool.shape[1]} {_digest(pool.int().numpy().tobytes())[:16]}"
            if used
            else "",
            "bos": str(self.bos),
            "known": str(self.known),
            "ends": str(self.ends),
        }


def check_kept(
    place: str | Path | None, model: PreTrainedModel, config: SelfTextConfig, seed: int, length: int
) -> None:
    """Refuse a file that can't serve a run, before the run does any work; arguments as for :class:`SelfText`.

    Raises:
        ValueError: it is damaged, or holds what another model or setting wrote.
    """
    window_file(place, _common(model, config, seed, length)).read()


def _common(
    model: PreTrainedModel, config: SelfTextConfig, seed: int, length: int
) -> dict[str, str]:
    """What decides every window, as text."""
    return {
        "model": model_digest(model)[:16],
        "seed": str(seed),
        "temperature": str(config.temperature),
        "length": str(length),
    }


class _Clock:
    """Tells about tokens, with the rate of this batch."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.done, self.begun = progress, 0, time.perf_counter()

    def __call__(self, rows: int) -> None:
        self.done += rows
        rate = self.done / (time.perf_counter() - self.begun)
        self.progress.advance(rows, note=f"{rate:.0f} tokens a second")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
