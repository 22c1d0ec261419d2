"""What the code imports is what pyproject.toml asks for, and the oldest versions that were run are those it allows."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"nanoquant", "nanoquant_kernels"}
PARTS = {"PIL": "matplotlib", "cycler": "matplotlib"}
"""What its users take for a part of another library, which asks for it."""


def plain(name):
    """A name as packaging compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked(lines):
    """Lower bounds of requirements by name; None where there is none."""
    lines = [line for line in lines if not line.startswith("#")]
    found = (re.match(r"([\w.-]+)(?:\[[\w,]+\])?(?:[>=]=([\w.*]+))?", line) for line in lines)
    return {plain(match[1]): match[2] for match in found}


def imported(folder):
    """Top names of every import of a package, within functions too."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.partition(".")[0]


def test_every_import_is_asked_for():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    known = asked([*PROJECT["dependencies"], *extras]).keys()
    names = {*imported(ROOT / "nanoquant"), *imported(ROOT / "kernels" / "nanoquant_kernels")}
    names -= sys.stdlib_module_names | OWN
    places = packages_distributions()
    owners = {
        name: {PARTS.get(name), *(plain(place) for place in places.get(name, [name]))}
        for name in names
    }
    assert {name for name, found in owners.items() if not found & known} == set()


def test_the_oldest_versions_are_those_that_were_run_together():
    pins = asked((ROOT / "constraints-oldest.txt").read_text().splitlines())
    extras = PROJECT["optional-dependencies"]
    wanted = asked([*PROJECT["dependencies"], *extras["demo"], *extras["plots"], *extras["tune"]])
    same = {name: bound for name, bound in wanted.items() if name in pins}
    assert {"torch", "torchao", "transformers", "lightning", "peft"} <= same.keys()
    for name, bound in same.items():
        assert f"{pins[name]}.".startswith(f"{bound}."), name
