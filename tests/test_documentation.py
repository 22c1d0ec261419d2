"""What README.md and CONTRIBUTING.md say is so: files, order, commands, examples."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from file_order import ORDER
from tiny_models import tiny_llama, tiny_tokenizer

import nanoquant
from nanoquant import parsers
from nanoquant.admm import ADMMConfig
from nanoquant.block_config import BlockConfig
from nanoquant.budget import BudgetConfig
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.model_config import ModelConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_lists_every_file_in_the_order_of_imports():
    table = CONTRIBUTING.split("## Rules")[0]
    groups = re.findall(r"`nanoquant/([\w/]*?)(\w+|\{[\w, ]+\})\.py`", table)
    listed = [folder + name for folder, names in groups for name in re.findall(r"\w+", names)]
    assert [path.replace("/", ".") for path in listed] == [n for n in ORDER if "__" not in n]


def test_kernels_folder_shadows_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packages_are_listed_where_they_are():
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = dict(
        re.findall(
            r'^(\w+) = "([\w/]+)"$',
            settings.split("package-dir]")[1].split("[tool")[0],
            re.MULTILINE,
        )
    )
    listed = re.findall(
        r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", settings, re.MULTILINE | re.DOTALL)[1]
    )
    found = [
        ".".join([name, *file.parent.relative_to(ROOT / folder).parts])
        for name, folder in folders.items()
        for file in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found) and {"nanoquant", "nanoquant_kernels"} == folders.keys()


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_path_named_exists(text):
    paths = re.findall(r"`(?:python )?([\w./-]+/[\w./-]*|\w+\.(?:md|toml|py))`", text)
    ignored = {"__init__.py"}
    assert (
        paths
        and [path for path in paths if path not in ignored and not (ROOT / path).exists()] == []
    )


def test_readme_fits_two_screens_and_contributing_little_more():
    assert len(README.splitlines()) <= 105 and len(CONTRIBUTING.splitlines()) <= 125


def test_figures_of_readme_are_among_all_results():
    rows = re.findall(r"^\| (`make demo.*|dense.*|int4.*|awq3.*) \|$", README, re.MULTILINE)
    results = (ROOT / "recipes" / "results.md").read_text(encoding="utf-8").split("## Decoding")[0]
    known = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines()]
    assert len(rows) >= 10
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert any(cells[:6] == other[:6] and cells[6:] == other[8:] for other in known), row


def test_make_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    assert set(re.findall(r"make (\w+)", README + CONTRIBUTING)) <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_readme_commands_parse():
    lines = re.findall(r"^nanoquant (\w+) (.*)$", README, re.MULTILINE)
    assert list(dict.fromkeys(command for command, _ in lines)) == [
        "quantize",
        "evaluate",
        "generate",
        "inspect",
        "doctor",
        "estimate",
        "bench",
        "advise",
        "report",
        "push",
    ]
    own = {
        "quantize": parsers.parse_quantize,
        "evaluate": parsers.parse_evaluate,
        "bench": parsers.parse_bench,
        "estimate": parsers.parse_estimate,
        "report": parsers.parse_report,
    }
    for command, arguments in lines:
        if command in own:
            own[command](shlex.split(arguments))
        else:
            own_files = {"advise": "advice.command", "doctor": "doctor.command"}
            own_files["push"] = "hub.command"
            module = f"nanoquant.{own_files.get(command, 'commands')}"
            function = getattr(importlib.import_module(module), f"{command}_command")
            parsers.parse(parsers.command_parser(command, function, ""), shlex.split(arguments))


def test_readme_example_runs(tmp_path, monkeypatch):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "MODEL")
    tiny_tokenizer().save_pretrained(tmp_path / "MODEL")
    (tmp_path / "text.txt").write_text("the river runs over stone and light falls on it\n" * 50)
    small = {
        "budget": BudgetConfig(rank_multiple=8),
        "calibration": CalibrationConfig(windows=2, length=32),
        "admm": ADMMConfig(iterations=5),
        "block": BlockConfig(windows=2, dense_epochs=0, refine_epochs=0),
        "model": ModelConfig(windows=2, held_out=1),
    }
    monkeypatch.setattr(
        nanoquant, "nanoquant_config", lambda **flags: nanoquant_config(**flags, **small)
    )
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    values = {}
    exec(example, values)  # the text of our own README
    assert values["report"].sizes == nanoquant.read_sizes(values["model"])
