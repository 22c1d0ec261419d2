"""Files and functions keep the sizes that CONTRIBUTING.md allows."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    file
    for folder in ("nanoquant", "kernels", "recipes", "tests", "tutorials")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
LINES, SCREEN = 300, 60


def test_files_have_at_most_300_lines():
    sizes = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in FILES}
    assert len(sizes) > 300
    assert {name: size for name, size in sizes.items() if size > LINES} == {}


def body(function):
    """Lines of a function after its docstring."""
    first = function.body[1:2] or function.body[:1]
    begin = first[0] if ast.get_docstring(function) else function.body[0]
    return function.end_lineno - begin.lineno + 1


def test_functions_fit_a_screen():
    sizes = {
        f"{file.relative_to(ROOT)}:{node.name}": body(node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > SCREEN} == {}
