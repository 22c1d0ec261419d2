"""What the page is made of; data without any HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plot:
    """A figure as PNGs for a light and a dark page, with what to read from it and a text in its place."""

    name: str
    """File name without its ending."""
    light: bytes
    dark: bytes
    size: tuple[int, int]
    """Width and height in pixels of the page."""
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; first column left, the others right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether it is shut until a reader opens it; its second column is aligned left then."""


@dataclass(frozen=True)
class Texts:
    """Texts beside each other, each under a title; line breaks are kept."""

    caption: str
    columns: Sequence[tuple[str, str]]


@dataclass
class Section:
    """One topic; ``missing`` says what it can't show and why."""

    key: str
    title: str
    items: list[Plot | Table | Texts] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def short(text: str, most: int = 40) -> str:
    """The text in one line of bearable length: its middle left out, and what can't be printed."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-(most // 2 - 2) :]}"


def figure(value: float | None, form: str = ".4g") -> str:
    """The number as text; "-" for one that is not known."""
    return "-" if value is None else format(value, form)
