"""YAML of any origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEEPEST = 50
"""Levels of settings; the time that PyYAML takes grows with their square."""


def is_file(name: str) -> bool:
    """Whether a text names a file, which can be read twice; a pipe can't, and some text is too long for a name."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False


def read_yaml(file: str | Path) -> Any:  # noqa: ANN401
    """What a YAML file says.

    Raises:
        ValueError: it can't be read, or refers to a part of itself: a few such lines can stand for more than fits in
            any memory.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        check_yaml(text)
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} can't be read as YAML: {error}") from error


def check_yaml(text: str) -> None:
    """Refuse what a few lines can make larger than any memory, and keys that are given twice.

    Raises:
        ValueError: it has aliases, more levels than DEEPEST, or a key twice.
    """
    depth, start = 0, text[:60]
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{start!r} has aliases (*name); write the value in their place")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"{start!r} has more than {DEEPEST} levels")
    _check_keys(yaml.compose(text))


def _check_keys(node: yaml.Node | None) -> None:
    """Raise ValueError naming a key that a mapping has twice, and where."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{key.value} is given twice, in lines {lines[key.value]} and {line}; keep one"
                )
            lines[key.value] = line
        _check_keys(value)
