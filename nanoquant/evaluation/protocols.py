"""Perplexity protocols: frozen, named, versioned. A figure says which text it is about only with all of them.

wikitext2: the raw test split, rows joined by blank lines, tokenized in one call with the tokenizer's own special
tokens, windows of 2048 that do not overlap, the tail dropped. c4: the first 1100 documents of the first validation
shard, joined by a space, at most 256 windows of 2048. Families that need BOS in every window (Gemma) get it there
instead, in front of 2047 tokens. text: any local text, windows as asked for.

Shapes: N windows of T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoquant.data import DataConfig, bos_of, load_tokens, make_windows
from nanoquant.evaluation.local_data import find_files, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = "text"
TEXT_VERSION = 1
BOS_FAMILIES = ("gemma",)
"""Words in the model type of families that were trained with BOS in front of every text and fail without."""
PROBE = "The city lies on the river;\n it's 12.5 km\taway."
"""Text whose token ids tell tokenizers of equal vocabularies apart."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A text and how it is cut; a change of any field is a new version."""

    version: int = 1
    source: str
    """Data set on the Hub."""
    config: str | None = None
    """Its configuration."""
    files: str | None = None
    """Its only file that is read; None for all of the split."""
    split: str
    """Its split."""
    rows: int
    """Documents that are read."""
    whole: bool
    """Whether these are all there are."""
    join: str
    """What stands between documents."""
    length: int = 2048
    """Tokens of a window, T."""
    windows: int | None = None
    """Most windows, N; None takes all that fit."""
    folders: tuple[str, ...]
    """Where it may lie in a local folder."""

    def settings(self) -> dict[str, Any]:
        """What is frozen, for the record."""
        return {name: value for name, value in asdict(self).items() if name != "folders"}


PROTOCOLS = {
    "wikitext2": Protocol(
        source="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        split="test",
        rows=4358,
        whole=True,
        join="\n\n",
        folders=("wikitext2", "wikitext-2-raw-v1", "wikitext/wikitext-2-raw-v1"),
    ),
    "c4": Protocol(
        source="allenai/c4",
        files="en/c4-validation.00000-of-00008.json.gz",
        split="validation",
        rows=1100,
        whole=False,
        join=" ",
        windows=256,
        folders=("c4", "c4/en", "en"),
    ),
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """Windows (N, T) of one protocol, and its settings with all that was resolved."""

    name: str
    windows: Tensor
    settings: dict[str, Any]


def prepare_text(
    data: DataConfig, bos: bool | None, tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """Windows of a local text.

    Args:
        data: which text and which windows.
        bos: BOS in front of every window; None where the tokenizer puts it in front of a text.
        tokenizer: of the model.

    Raises:
        ValueError: the text is shorter than the windows need; tells both lengths.
    """
    each = bos_of(tokenizer) is not None if bos is None else bos
    tokens = load_tokens(data.text, tokenizer)
    first = _bos(tokenizer) if each else None
    windows = make_windows(tokens, data.length, data.windows, first, data.seed)
    settings = {"version": TEXT_VERSION, "source": data.text, "seed": data.seed}
    return _prepared(TEXT, windows, settings, each)


def prepare(
    name: str,
    bos: bool | None,
    tokenizer: PreTrainedTokenizerBase,
    model_type: str,
    data: str | None = None,
) -> Prepared:
    """Windows of a frozen protocol.

    Args:
        name: a key of ``PROTOCOLS``.
        bos: BOS in front of every window; None by the family of the model.
        tokenizer: of the model.
        model_type: of the model's config.
        data: local folder; None reads the Hub.

    Raises:
        ValueError: the data set is not there or is another one.
    """
    protocol = PROTOCOLS[name]
    each = any(word in model_type for word in BOS_FAMILIES) if bos is None else bos
    text = protocol.join.join(_documents(name, protocol, data))
    ids = tokenizer(text, add_special_tokens=not each, verbose=False, return_attention_mask=False)
    tokens = torch.tensor(ids["input_ids"], dtype=torch.long)
    windows = make_windows(tokens, protocol.length, None, _bos(tokenizer) if each else None)
    windows = windows[: protocol.windows]
    settings = protocol.settings() | {"data": data, "text_sha256": _digest(text.encode())}
    return _prepared(name, windows, settings, each)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tells tokenizers apart: class, size, and a digest of the vocabulary and of how it splits a text."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"]]
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "sha256": _digest(json.dumps(content).encode()),
    }


def _documents(name: str, protocol: Protocol, data: str | None) -> list[str]:
    """The documents of a protocol, all of them strings and as many as it says.

    Raises:
        ValueError: there are others.
    """
    if data is None:
        rows: Iterable[str] = _hub_rows(protocol)
    else:
        _, files = find_files(data, protocol.folders, (protocol.split,))
        rows = (row["text"] for row in read_rows(files, ("text",), f"the protocol {name}"))
    documents = list(islice(rows, protocol.rows + protocol.whole))
    if len(documents) != protocol.rows:
        count = len(documents) if len(documents) < protocol.rows else f"more than {protocol.rows}"
        raise ValueError(
            f"the protocol {name} reads {protocol.rows} rows of {protocol.source}, but {data or 'the Hub'} "
            f"holds {count}; for another text give --protocol {TEXT} --text FILE"
        )
    return documents


def _hub_rows(protocol: Protocol) -> Iterator[str]:
    """Stream the texts of a protocol from the Hub."""
    import datasets

    files = None if protocol.files is None else {protocol.split: protocol.files}
    try:
        rows = datasets.load_dataset(
            protocol.source, protocol.config, data_files=files, split=protocol.split, streaming=True
        )
        for row in rows:
            yield row["text"]
    except Exception as error:  # the library and the network have families of their own
        raise ValueError(
            f"the Hub did not give {protocol.source}: {type(error).__name__}: {error}. Without network "
            f"give --data DIR with the data set in DIR/{protocol.folders[0]}"
        ) from error


def _prepared(name: str, windows: Tensor, settings: dict[str, Any], each: bool) -> Prepared:
    count, length = windows.shape
    resolved = {
        "windows": count,
        "length": length,
        "bos_each_window": each,
        "tokens_sha256": _digest(windows.numpy().tobytes()),
    }
    return Prepared(name, windows, settings | resolved)


def _bos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "bos_each_window is true, but the tokenizer has no BOS token; give false or auto"
        )
    return tokenizer.bos_token_id


def _digest(content: bytes) -> str:
    """First half of a SHA-256."""
    return hashlib.sha256(content).hexdigest()[:32]
