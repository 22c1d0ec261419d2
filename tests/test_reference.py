"""The API reference builds without a warning and has all that is public."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nanoquant
import nanoquant_kernels
from nanoquant import cli
from nanoquant.config import NanoQuantConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the pages."""
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install 'nanoquant[docs]'")
    folder = tmp_path_factory.mktemp("reference")
    flags = ["-q", "-W", "--keep-going", "-b", "html", "-d", folder / "doctrees"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *flags, ROOT / "tutorials" / "reference", folder / "html"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.fixture(scope="module")
def pages(built):
    """Text of every page by name."""
    return {file.stem: file.read_text(encoding="utf-8") for file in built.glob("*.html")}


def test_every_public_name_is_described(pages):
    described = "".join(pages.values())
    names = [f"nanoquant.{name}" for name in nanoquant.__all__]
    names += [f"nanoquant_kernels.{name}" for name in nanoquant_kernels.__all__]
    assert [name for name in names if f'id="{name}"' not in described] == []


def test_what_documents_tell_to_import_is_described(pages):
    described, told = "".join(pages.values()), set()
    for file in (ROOT / "README.md", *ROOT.joinpath("recipes").glob("*.md")):
        text = file.read_text(encoding="utf-8")
        for module, names in re.findall(r"^from (nanoquant[\w.]*) import ([\w, ]+)$", text, re.M):
            told |= {f"{module}.{name}" for name in names.split(", ")}
        told |= set(re.findall(r"`(nanoquant\.\w+\.[\w.]+)\(", text))
    assert told >= {"nanoquant.adapters.save_adapter", "nanoquant.adapters.load_adapter"}
    assert [name for name in sorted(told) if f'id="{name}"' not in described] == []


def configs(kind):
    """A config and those of its stages, with nested ones."""
    yield kind
    for field in dataclasses.fields(kind):
        made = field.default_factory
        if made is not dataclasses.MISSING and dataclasses.is_dataclass(value := made()):
            yield from configs(type(value))


def jobs():
    """Configs of the commands beside that of a quantization."""
    for place in (
        *("job_config.JobConfig", "data.DataConfig", "generation_settings.GenerationSettings"),
        *("evaluation.command.EvaluationJob", "evaluation.request.EvaluationRequest"),
        *("baselines.config.BaselineConfig", "estimate.request.EstimateConfig"),
        *("advice.config.AdviceConfig", "benchmark.config.BenchConfig"),
        *("report.config.ReportConfig", "fine_tune_config.FineTuneJob"),
        "fine_tune_config.FineTuneConfig",
    ):
        module, _, name = place.rpartition(".")
        yield getattr(importlib.import_module(f"nanoquant.{module}"), name)


def test_every_field_of_every_config_has_a_description_and_its_default(pages):
    page, missing = pages["settings"], []
    for kind in {*configs(NanoQuantConfig), *jobs()}:
        short, full = f"nanoquant.{kind.__name__}", f"{kind.__module__}.{kind.__qualname__}"
        for field in dataclasses.fields(kind):
            ids = [f'id="{owner}.{field.name}"' for owner in (short, full)]
            entry = next((page.split(i)[1].split("</dd>")[0] for i in ids if i in page), "")
            title, _, text = entry.partition("</dt>")
            made = field.default_factory is not dataclasses.MISSING
            given = field.default is not dataclasses.MISSING
            if "<p>" not in text or ("Default:" in text) != made:
                missing.append(f"{full}.{field.name}")
            if given and '<span class="pre">=</span>' not in title:
                missing.append(f"default of {full}.{field.name}")
    assert missing == []


def test_every_command_shows_its_help(pages):
    assert cli.COMMANDS
    for command in cli.COMMANDS:
        text = pages["commands"].split(f'id="command-{command}"')[1]
        assert f"usage: nanoquant {command}" in text[:400]
