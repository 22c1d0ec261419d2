"""Sections to one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from nanoquant.report.about import Head
from nanoquant.report.content import Plot, Section, Table, Texts

TEMPLATE = Path(__file__).with_name("page.html")


@cache
def _template() -> jinja2.Template:
    """The template; whatever is put into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["uri"] = _uri
    environment.tests |= {
        "plot": lambda item: isinstance(item, Plot),
        "table": lambda item: isinstance(item, Table),
        "texts": lambda item: isinstance(item, Texts),
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def render(
    head: Head, sections: list[Section], problems: list[str], versions: dict[str, Any]
) -> str:
    """The page as HTML.

    Args:
        head: what stands above everything.
        sections: in their order.
        problems: what could not be read, each a sentence.
        versions: of what made the page.
    """
    text = _template().render(head=head, sections=sections, problems=problems, versions=versions)
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "?" for c in text)


def _uri(png: bytes) -> str:
    """An image as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
