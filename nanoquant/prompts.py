"""Prompts from a file, continuations on the terminal, and how fast they were."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from nanoquant.console import say
from nanoquant.generate import Generation
from nanoquant.streaming import Write


def read_prompts(file: str) -> list[str]:
    """The lines of a UTF-8 file, one prompt each.

    Raises:
        ValueError: it can't be read, or a line is empty; names the line.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file} with prompts")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8; convert it") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"line {number} of {file} is empty; every line must hold a prompt")
    return lines


def printer(prompts: list[str]) -> Write:
    """Writes new text of a single prompt at once, of several under each prompt when it has ended."""
    pieces: dict[int, list[str]] = defaultdict(list)

    def write(number: int, text: str, last: bool) -> None:
        if len(prompts) == 1:
            say(text, end="\n" if last else "")
            return
        pieces[number].append(text)
        if last:
            say(f"> {prompts[number]}\n{''.join(pieces.pop(number))}\n")

    return write


def speed_lines(done: Generation) -> list[str]:
    """Prefill and decode in words; decode is left out where every text is one token long."""
    figures = done.figures()
    lines = [
        f"prefill: {sum(done.prompt_tokens):,} tokens in {{prefill_seconds:.3f}} s, "
        "{prefill_tokens_per_second:.1f} tokens/s"
    ]
    if figures["decode_tokens"]:
        lines.append(
            "decode: {decode_tokens:,} tokens in {decode_seconds:.3f} s, "
            "{decode_tokens_per_second:.1f} tokens/s; median step {step_seconds:.4f} s"
        )
    return [line.format(**figures) for line in lines]
