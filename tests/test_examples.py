"""Every example in a docstring and in the pages of the reference runs, on a tiny model."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import random_windows, tiny_llama, tiny_tokenizer

import nanoquant
import nanoquant_kernels
from nanoquant.architectures import find_decoder
from nanoquant.config import nanoquant_config
from nanoquant.product_budget import ProductShape

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "nanoquant").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
PAGES = sorted((ROOT / "tutorials" / "reference").glob("*.rst"))
SMALL = {
    "calibration": {"windows": 2, "length": 32},
    "model": {"windows": 2, "held_out": 1},
}


def docstrings(file):
    """(line, docstring) of everything in a file that has one, fields of dataclasses too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, inspect.cleandoc(node.value.value)


def blocks(text, beginning):
    """Indented blocks below lines that end with ``beginning``."""
    for after in re.split(rf"^[^\n]*{beginning}\n\n", text, flags=re.MULTILINE)[1:]:
        yield textwrap.dedent(re.match(r"(?:(?: +[^\n]*)?\n)*(?: +[^\n]*)?", after)[0])


EXAMPLES = {
    f"{file.relative_to(ROOT)}:{line}": code
    for file in SOURCES
    for line, text in docstrings(file)
    for code in blocks(text, "Examples?::")
}
EXAMPLES |= {
    f"{file.name}:{number}": code
    for file in PAGES
    for number, code in enumerate(
        blocks(file.read_text(encoding="utf-8"), r"\.\. code-block:: python")
    )
}


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What examples take for granted, in a folder with a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the river runs over stone and light falls on it\n" * 50)

    def small_config(*given, budget=None, **fields):
        product = fields.get("method") == "product"
        own = {} if product else {"admm": {"iterations": 5}}
        steps = {} if product else {"rank_multiple": 8}
        return nanoquant_config(*given, budget=(budget or {}) | steps, **SMALL | own | fields)

    monkeypatch.setattr(nanoquant, "nanoquant_config", small_config)
    model = tiny_llama()
    return {
        "torch": torch,
        "nanoquant": nanoquant,
        "nanoquant_kernels": nanoquant_kernels,
        "nanoquant_config": small_config,
        "quantize": nanoquant.quantize,
        "model": model,
        "tokenizer": tiny_tokenizer(),
        "ids": random_windows(2, 16),
        "decoder": find_decoder(model),
        "weight": torch.randn(320, 320, generator=torch.manual_seed(0)),
        "importance": nanoquant.Importance(torch.ones(320), torch.ones(320)),
        "ProductShape": ProductShape,
        "progress": nanoquant.progress.Progress(),
    }


@pytest.mark.parametrize("place", EXAMPLES)
def test_the_example_runs(place, names):
    source = place.rpartition(":")[0]
    if source.endswith(".py"):
        parts = Path(source).relative_to("kernels" if source.startswith("kernels") else ".").parts
        own = vars(importlib.import_module(".".join(parts).removesuffix(".py")))
        names = own | names
    exec(EXAMPLES[place], names)  # the text of our own documentation


def test_there_are_examples_where_they_are_looked_for():
    files = {place.rpartition(":")[0] for place in EXAMPLES}
    assert {"nanoquant/quantize.py", "nanoquant/admm.py", "index.rst"} <= files
    said = sum(file.read_text(encoding="utf-8").count("Example") for file in SOURCES)
    assert said == sum(place.rpartition(":")[0].endswith(".py") for place in EXAMPLES)


def test_sessions_in_docstrings_give_what_they_say():
    """Lines after ``>>>``, wherever there are any."""
    done = []
    for file in SOURCES:
        if ">>>" not in file.read_text(encoding="utf-8"):
            continue
        parts = file.relative_to(ROOT / ("kernels" if "kernels" in file.parts else "")).parts
        module = importlib.import_module(".".join(parts).removesuffix(".py"))
        done.append(doctest.testmod(module))
    assert done and all(result.attempted and not result.failed for result in done)
