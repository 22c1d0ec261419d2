"""Flags as users write them, as jsonargparse takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SHORT = {"--bits": "--budget.bits"}


def spell_out(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Arguments with underscores and full names of flags, and true after a switch without a value.

    A flag that takes a list may be given several times, each time with one text; what a YAML before it gave is
    replaced, not continued.
    """
    switches = {
        f"--{action.dest}" for action in parser._actions if action.metavar == "{true,false}"
    }
    known = parser._option_string_actions
    spelled, rest, begun = [], list(arguments), set()
    while rest:
        argument = rest.pop(0)
        following = rest[0] if rest else ""
        name, equals, value = argument.partition("=")
        flag = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        flag = SHORT.get(flag, flag) if SHORT.get(flag) in known else flag
        if f"{flag}+" in known and (equals or rest):
            item = value if equals else rest.pop(0)
            append = "+" if flag in begun else ""
            spelled.append(f"{flag}{append}=[{_quoted(item)}]")  # else "null" would not be text
            begun.add(flag)
            continue
        begun = set() if flag == "--config" else begun
        switched = flag in switches and not equals and following not in ("true", "false")
        spelled.append(f"{flag}=true" if switched else flag + equals + value)
    return spelled


def _quoted(text: str) -> str:
    """A text as YAML takes it whatever it holds."""
    plain = (
        c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}"
        for c in text
    )
    return f'"{"".join(plain)}"'
