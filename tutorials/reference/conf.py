"""Sphinx settings of the API reference: autodoc on the sources, nothing that a page would have to repeat.

`make docs` builds it into `build/reference`; a warning is an error.
"""

import contextlib
import dataclasses
import importlib
import io
import os

from docutils import nodes
from docutils.parsers.rst import Directive

from nanoquant.console import quiet

quiet()
os.environ["COLUMNS"] = "110"  # of help texts
import nanoquant  # noqa: E402
from nanoquant import cli  # noqa: E402

project, version = "nanoquant", nanoquant.__version__
author, project_copyright = "the authors of nanoquant", "the authors of nanoquant, Apache-2.0"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"description": nanoquant.__doc__.splitlines()[0]}
html_show_sourcelink = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def describe_field(app, what, name, value, options, lines):
    """Keep napoleon from reading "fast: what it means" as a type, and say the default that a factory makes."""
    if what != "attribute":
        return
    lines.insert(0, "")
    owner, _, attribute = name.rpartition(".")
    module, _, kind = owner.rpartition(".")
    found = getattr(importlib.import_module(module), kind)
    for field in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        if field.name == attribute and field.default_factory is not dataclasses.MISSING:
            lines += ["", f"Default: ``{field.default_factory()!r}``."]


def printed(*arguments):
    """What the command line prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(arguments)
    return nodes.literal_block(text=out.getvalue().rstrip(), language="none")


class AllCommands(Directive):
    """``.. all-commands::``: the help of each command in a section of its own."""

    def run(self):
        """Nodes of the page."""
        found = [printed("--help")]
        for command in cli.COMMANDS:
            section = nodes.section(ids=[nodes.make_id(f"command-{command}")])
            section += [nodes.title(text=f"nanoquant {command}"), printed(command, "--help")]
            found.append(section)
        return found


def setup(app):
    """Called by Sphinx."""
    app.add_directive("all-commands", AllCommands)
    app.connect("autodoc-process-docstring", describe_field, priority=400)  # before napoleon
