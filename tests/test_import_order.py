"""The package reads from top to bottom: a file imports only from files above it."""

import ast
from pathlib import Path

import pytest
from file_order import ORDER

import nanoquant

PACKAGE = Path(nanoquant.__file__).parent

AFTERWARDS = {
    ("packed_linear", "packed_tensor"),
    ("packed_linear", "shared_launch"),
    ("product_packed", "product_tensor"),
}
"""Imports of later files inside a function; the earlier file must work without them."""

HEAVY = {"torchao", "lightning", "triton", "datasets", "wandb", "jsonargparse", "peft", "vllm"}
MAY_IMPORT = {
    "packed_parallel": {"torchao"},
    "packed_weight": {"torchao"},
    "packed_tensor": {"torchao"},
    "product_tensor": {"torchao"},
    "config": {"torchao"},
    "transform": {"torchao"},
    "baselines.packed_integers": {"torchao"},
    "data_parallel": {"lightning"},
    "training": {"lightning"},
    "early_stop": {"lightning"},
    "parsers": {"jsonargparse"},
    "lora": {"peft"},
    "serving.vllm_linear": {"vllm"},
}
"""Files that import heavy libraries at their top; others do it where they use them."""


def files():
    """Every file below the package as Python would name it: "admm", "benchmark.timing"."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(path.parts) for path in paths)


def imported(nodes):
    """Names of modules that import statements among ``nodes`` mention, and of what they take from a package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(names):
    """Files of the package among the names of modules."""
    prefix = "nanoquant."
    return {n.removeprefix(prefix) for n in names if n.startswith(prefix)} & set(files())


def parse(name):
    return ast.parse(PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_text())


def type_checking(tree):
    """Nodes that only type checkers read."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def test_the_order_lists_every_file_once():
    assert len(set(ORDER)) == len(ORDER)
    assert set(files()) <= set(ORDER), "add the new file to ORDER, where it belongs"


@pytest.mark.parametrize("stem", files())
def test_a_file_imports_only_from_files_above_it(stem):
    tree = parse(stem)
    skipped = type_checking(tree)
    names = own(imported(node for node in ast.walk(tree) if id(node) not in skipped))
    allowed = set(ORDER[: ORDER.index(stem)]) | {b for a, b in AFTERWARDS if a == stem}
    assert names <= allowed
    assert not own(imported(tree.body)) & {b for a, b in AFTERWARDS if a == stem}


@pytest.mark.parametrize("stem", files())
def test_heavy_libraries_are_imported_at_the_top_only_where_they_are_the_point(stem):
    top = {name.split(".")[0] for name in imported(parse(stem).body)}
    assert top & HEAVY <= MAY_IMPORT.get(stem, set())


def test_the_kernels_do_not_know_the_library():
    folder = PACKAGE.parent / "kernels" / "nanoquant_kernels"
    for path in folder.glob("*.py"):
        assert not any(
            name.split(".")[0] == "nanoquant"
            for name in imported(ast.walk(ast.parse(path.read_text())))
        )
