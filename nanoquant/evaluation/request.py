"""What is measured, and by which protocols: the settings of an evaluation, checked before any work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from nanoquant.data import DataConfig
from nanoquant.evaluation.protocols import PROTOCOLS, TEXT
from nanoquant.evaluation.tasks import TASKS

ALL = "all"
SOFTMAX_DTYPES = (None, "float32")
SWITCHES = {"auto": None, "true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is measured."""

    text: str | None = None
    """Text of the protocol "text": a text, .jsonl, .pt or .safetensors file, or a data set as name:config:split."""
    protocol: str | None = None
    """Protocols of perplexity, separated by commas: wikitext2, c4, text; null takes text where a --text is given."""
    windows: int = DataConfig.windows
    """Number of windows of the protocol "text"; the others fix theirs."""
    length: int = DataConfig.length
    """Tokens of a window of the protocol "text"; the others fix theirs."""
    seed: int | None = None
    """Seed that chooses the windows of the protocol "text"; null takes the first ones in order."""
    bos_each_window: str = "auto"
    """Whether every window begins with the BOS token: true, false, or auto by the protocol's rule for the family."""
    zero_shot: str | None = None
    """Zero-shot tasks by lm-evaluation-harness, separated by commas, or all; needs the extra "eval"."""
    questions: int | None = None
    """Only the first questions of every task; null takes all."""
    batch: int = 8
    """Most sequences of a task in one forward pass; it moves the last bits of a bfloat16 model."""
    softmax_dtype: str | None = None
    """Type of a task's log-probabilities, such as float32; null: the model's own, which is the harness's default."""
    data: str | None = None
    """Folder with the data sets of protocols and tasks; null takes them from the Hub."""

    def __post_init__(self) -> None:
        if self.bos_each_window not in SWITCHES:
            raise ValueError(
                f"bos_each_window must be {', '.join(SWITCHES)}, got {self.bos_each_window!r}"
            )
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; allowed: 1 or more")
        if self.softmax_dtype not in SOFTMAX_DTYPES:
            raise ValueError(f"softmax_dtype must be null or float32, got {self.softmax_dtype!r}")
        if self.questions is not None and self.questions < 2:
            raise ValueError(f"questions is {self.questions}; a standard error needs 2 or more")
        if self.questions is not None and not self.tasks:
            raise ValueError("--questions is about --zero-shot; name tasks with it")
        if TEXT in self.protocols and self.text is None:
            raise ValueError(f"the protocol {TEXT!r} needs a text: give --text FILE")
        if self.text is not None and TEXT not in self.protocols:
            raise ValueError(f"{self.protocol} does not use --text {self.text}; add ,{TEXT} to it")
        if self.text is not None:
            DataConfig(text=self.text, windows=self.windows, length=self.length)
        _named(self.zero_shot or ALL, [*TASKS, ALL], "task")

    @property
    def protocols(self) -> list[str]:
        """Names of the perplexity protocols.

        Raises:
            ValueError: there is none of that name; tells the nearest.
        """
        if self.protocol is None:
            return [] if self.text is None else [TEXT]
        return _named(self.protocol, [*PROTOCOLS, TEXT], "protocol")

    @property
    def tasks(self) -> list[str]:
        """Names of the zero-shot tasks.

        Raises:
            ValueError: there is none of that name; tells the nearest.
        """
        if self.zero_shot is None:
            return []
        return list(TASKS) if self.zero_shot == ALL else _named(self.zero_shot, TASKS, "task")

    @property
    def text_data(self) -> DataConfig:
        """The windows of the protocol "text"."""
        return DataConfig(
            text=self.text or "", windows=self.windows, length=self.length, seed=self.seed
        )

    @property
    def bos(self) -> bool | None:
        """Whether BOS begins every window; None leaves it to the protocol."""
        return SWITCHES[self.bos_each_window]

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return not self.protocols and not self.tasks


def _named(text: str, known: Iterable[str], kind: str) -> list[str]:
    """The names in a list with commas, each once."""
    known = list(known)
    names = [item.strip() for item in text.split(",") if item.strip()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"there is no {kind} {name!r}{hint}; all: {', '.join(known)}")
    if not names:
        raise ValueError(f"give at least one {kind}: {', '.join(known)}")
    return list(dict.fromkeys(names))
