"""Text for calibration and evaluation: from a file, a data set or a tensor to windows of tokens.

A source is one text. The documents of a JSONL file or of a data set are joined by a blank line,
as in published perplexity figures, and the text is tokenized in one piece. Conversations follow each
other as the chat template leaves them: it has marks of its own.

Shapes: n tokens of a source, N windows, T tokens a window.
"""

import dataclasses
import difflib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nanoquant.chat import render
from nanoquant.json_files import parse_json
from nanoquant.tensor_pickles import load_pickle

logger = logging.getLogger(__name__)

BLANK_LINE = "\n\n"
LEAST_CHARACTERS = 50_000_000
"""Characters up to which the documents of a JSONL file or a data set are read, whatever is asked of them."""
CHARACTERS_A_TOKEN = 8
"""More are read where tokens are asked for: so many for each, about twice what English text takes."""
TENSOR_SUFFIXES = (".pt", ".safetensors")
JSON_LINES = (".jsonl", ".ndjson")
FILE_SUFFIXES = (".txt", *JSON_LINES, *TENSOR_SUFFIXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how much of it."""

    text: str
    """A text file, a .jsonl file with "text" or chat "messages" per line, a .pt or .safetensors file with token ids,
    or a data set of the datasets library as name:split or name:config:split."""
    windows: int = 64
    """Number of windows taken from the text."""
    length: int = 512
    """Tokens in a window."""
    seed: int | None = None
    """Seed that chooses the windows; None takes the first ones in order."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_windows(self.length, self.windows)


def load_tokens(
    source: str | Path | Tensor, tokenizer: PreTrainedTokenizerBase | None, wanted: int = 0
) -> Tensor:
    """Read a source and tokenize it, without special tokens.

    Args:
        source: As ``DataConfig.text``, or a tensor of token ids (any shape, flattened).
        tokenizer: Tokenizer of the model; needed for text, and checks the range of token ids.
        wanted: Tokens that are asked of it: how far the documents of a JSONL file or a data set are read.

    Returns:
        Token ids (n,), int64, on the CPU.

    Raises:
        ValueError: The source is missing, empty, not text, or holds no such token ids.
    """
    if isinstance(source, Tensor):
        return _check_tokens(source, "the tokens tensor", tokenizer)
    path = local_path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file of text or of token ids")
    if path.is_file() and path.suffix in TENSOR_SUFFIXES:
        return _check_tokens(_read_tensor(path), str(path), tokenizer)
    if tokenizer is None:
        raise ValueError(f"{source} is text and needs a tokenizer; got None")
    most = max(LEAST_CHARACTERS, CHARACTERS_A_TOKEN * wanted)
    if path.is_file():
        jsonl = path.suffix.lower() in JSON_LINES
        if path.suffix.lower() == ".json":
            raise ValueError(
                f"{path} is one JSON value; write a text or one object a line into a .jsonl file"
            )
        text = (
            _join(_read_jsonl(path, tokenizer), most) if jsonl else _decode(path.read_bytes(), path)
        )
    elif _is_dataset_name(str(source)):
        text = _join(_read_dataset(str(source), tokenizer), most)
    else:
        raise ValueError(_missing_file(path))
    if not text.strip():
        raise ValueError(f"{source} is empty; give a file or data set that holds text")
    # verbose=False: a whole text is longer than the model's context, and a warning would say so
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)
    return torch.tensor(ids["input_ids"], dtype=torch.long)


def local_path(source: str | Path) -> Path:
    """Path of a file or folder; ``~`` and ``~name`` at its beginning stand for a home folder.

    Raises:
        ValueError: there is no such home folder.
    """
    try:
        return Path(source).expanduser()
    except RuntimeError:
        home = Path(source).parts[0]
        raise ValueError(f"{source}: found no home folder for {home}; give the full path") from None


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS token of models that expect one at the start of every window (Gemma), else None.

    A model expects it when its tokenizer adds it to a plain text.
    """
    ids = tokenizer("text")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def make_windows(
    tokens: Tensor,
    length: int,
    count: int | None = None,
    bos_token_id: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Cut tokens into distinct windows that do not overlap.

    Args:
        tokens: Token ids (n,).
        length: Tokens of a window, T, BOS included.
        count: Number of windows, N; None takes all that fit.
        bos_token_id: Token to put first in every window, see ``bos_of``; None for none.
        seed: Seed that chooses which windows, and their order; None takes the first, in order.

    Returns:
        Token ids (N, T), int64.

    Raises:
        ValueError: There are too few tokens; tells how many there are and how many are needed.
    """
    _check_windows(length, count)
    body = length if bos_token_id is None else length - 1
    available = len(tokens) // body
    needed = (count or 1) * body
    if len(tokens) < needed:
        fits = f"at most {available} windows of this length" if available else "shorter windows"
        raise ValueError(
            f"the text has {len(tokens)} tokens, but {count or 1} windows of {body} tokens need "
            f"{needed}; give longer text, or ask for {fits}"
        )
    windows = tokens[: available * body].view(available, body).long()  # (available, body)
    if seed is not None:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        windows = windows[order]
    windows = windows[:count]
    if bos_token_id is None:
        return windows.clone()
    bos = torch.full((len(windows), 1), bos_token_id, dtype=torch.long)
    return torch.cat([bos, windows], dim=1)  # (N, T)


def _check_windows(length: int, count: int | None) -> None:
    """Check the shape of the windows asked for."""
    if length < 2:
        raise ValueError(f"window length is {length}; a window needs at least 2 tokens")
    if count is not None and count < 1:
        raise ValueError(f"the number of windows is {count}; allowed: 1 or more")


def _decode(raw: bytes, path: Path, begin: int = 0) -> str:
    """Text of a file's bytes from ``begin`` on, as it is; refuse binary ones."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{error.reason}, byte {begin + error.start}"
        raise ValueError(f"{path} is not UTF-8 text ({place})") from None
    if "\0" in text:
        raise ValueError(f"{path} is a binary file (it holds NUL bytes); give UTF-8 text")
    return text


def _read_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield the document of every line of a JSONL file, see ``_document``; lines not asked for are not read."""
    begin = 0
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            line = _decode(raw, path, begin).removesuffix("\n")
            begin += len(raw)
            if not line.strip():
                continue
            try:
                document = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            yield _document(document, tokenizer, f"{path}, line {number}")


def _document(row: object, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """The text of a row, and what separates it from the next: a blank line, or nothing after a conversation."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"], BLANK_LINE
    if isinstance(row, dict) and row.get("messages") is not None:
        text = render(row["messages"], tokenizer, where)
        if bos_of(tokenizer) is not None:  # every window begins with it already
            text = text.removeprefix(tokenizer.bos_token)
        return text, ""
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f'{where} has no string under "text" and no "messages"; found: {found}')


def _is_dataset_name(source: str) -> bool:
    """Tell name:split and name:config:split, which may hold dots, from paths of missing files."""
    parts = source.split(":")
    return len(parts) in (2, 3) and all(parts) and not source.endswith(FILE_SUFFIXES)


def _read_dataset(source: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """Yield the document of every row of a data set, see ``_document``."""
    for number, row in enumerate(_dataset_rows(source), start=1):
        yield _document(row, tokenizer, f"{source}, row {number}")


def _dataset_rows(source: str) -> Iterator[object]:
    """Stream the rows of a data set of the datasets library."""
    name, *config, split = source.split(":")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source} names a data set, but the datasets library is not installed: "
            "pip install datasets, or give a text file"
        ) from None
    try:
        yield from datasets.load_dataset(name, *config, split=split, streaming=True)
    except Exception as error:
        raise ValueError(
            f"could not read the data set {source}: {type(error).__name__}: {error}. Check the "
            "name (name:split or name:config:split) and the network, or give a local text file"
        ) from error


def _join(documents: Iterable[tuple[str, str]], most: int) -> str:
    """Join (text, what follows it) to one text of at most ``most`` characters, or the first one."""
    kept, size = [], 0
    for document, gap in documents:
        if size + len(document) > most and kept:
            logger.warning("read only the first %d documents (%d characters)", len(kept), size)
            break
        kept.append((document, gap))
        size += len(document) + len(gap)
    text = "".join(document + gap for document, gap in kept)
    return text.removesuffix(kept[-1][1]) if kept else text


def _read_tensor(path: Path) -> Tensor:
    """Read the only tensor of a .pt or .safetensors file."""
    if path.suffix == ".pt":
        content = load_pickle(path)
    else:
        try:
            content = load_file(path)
        except Exception as error:
            raise ValueError(f"{path} is no readable tensor file: {error}") from error
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise ValueError(f"{path} must hold exactly one tensor of token ids; found {len(tensors)}")
    return tensors[0]


def _check_tokens(tokens: Tensor, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Check the type and the range of token ids, and flatten them."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{where} has dtype {tokens.dtype}; token ids are integers")
    if tokens.numel() == 0:
        raise ValueError(f"{where} is empty; give token ids")
    tokens = tokens.reshape(-1).long().cpu()
    low, high = int(tokens.min()), int(tokens.max())
    limit = len(tokenizer) if tokenizer is not None else high + 1
    if low < 0 or high >= limit:
        raise ValueError(f"{where} holds ids {low} to {high}; the tokenizer has 0 to {limit - 1}")
    return tokens


def _missing_file(path: Path) -> str:
    """Message for a missing file, with the names nearest to it in its folder."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"; near names there: {', '.join(near)}" if near else ""
    return (
        f"found no file {path}{hint}. Give a text, .jsonl, .pt or .safetensors file, "
        "or a data set as name:split or name:config:split"
    )
