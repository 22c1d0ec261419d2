"""Cells run on a tiny model, once each; one that fails is on record and stops no other."""

import json
import math

import pytest

from nanoquant.ablation import cells
from nanoquant.ablation.cells import run_plan
from nanoquant.ablation.plan import read_plan
from nanoquant.ablation.table import markdown, rows, write_csv

pytestmark = pytest.mark.usefixtures("untouched_process")
YAML = """base:
  text: {text}
  eval_text: {text}
  eval_windows: 2
  eval_length: 32
  budget.rank_multiple: 8
  admm.iterations: 5
  calibration: {{windows: 2, length: 32}}
  block.windows: 2
  model: {{windows: 4, held_out: 1}}
axes:
  phases:
    start: {{model.train: none}}
    all: {{}}
  run.seed: [0, 1]
"""


@pytest.fixture
def plan(place, tmp_path):
    (tmp_path / "plan.yaml").write_text(YAML.format(text=place / "text.txt"))
    return read_plan(tmp_path / "plan.yaml", str(place / "dense"))


def test_a_plan_runs_once_and_repeats_only_what_failed(plan, tmp_path, monkeypatch):
    quantized, quantize = [], cells.quantize

    def failing(model, data, config, *arguments, **flags):
        quantized.append(config)
        if len(quantized) == 2:
            raise FloatingPointError("loss is nan")
        return quantize(model, data, config, *arguments, **flags)

    monkeypatch.setattr(cells, "quantize", failing)
    first = run_plan(plan, tmp_path / "out")
    assert [record["status"] for record in first] == ["finished", "failed", "finished", "finished"]
    assert first[1]["error"] == "FloatingPointError: loss is nan"
    assert [config.model.train for config in quantized] == ["none", "none", "signs", "signs"]
    table = markdown(rows(first))
    assert "failed: phases start: FloatingPointError: loss is nan" in table

    again = run_plan(plan, tmp_path / "out")
    assert len(quantized) == 5 and {record["status"] for record in again} == {"finished"}
    assert [again[k] for k in (0, 2, 3)] == [first[k] for k in (0, 2, 3)]
    monkeypatch.setattr(cells, "load_model", None)
    assert run_plan(plan, tmp_path / "out") == again

    record = again[3]
    assert record["perplexity"] > record["dense_perplexity"] > 1 and 0.9 < record["bits"] <= 1.0
    assert record["errors"].keys() == {"initialize", "model"} and record["divergence"] > 0
    assert record["untrained_perplexity"] > record["perplexity"]
    files = sorted((tmp_path / "out" / "cells").iterdir())
    assert [json.loads(file.read_text()) for file in files if "all-seed-1" in file.name] == [record]

    found = rows(again)
    assert [row.choices for row in found] == [{"phases": "start"}, {"phases": "all"}]
    logs = [math.log(r["perplexity"] / r["dense_perplexity"]) for r in again[2:]]
    assert found[1].values["excess"] == pytest.approx(sum(logs) / 2)
    assert found[1].values["spread"] == pytest.approx(abs(logs[0] - logs[1]) / math.sqrt(2))
    starts = [math.log(r["perplexity"] / r["dense_perplexity"]) for r in again[:2]]
    pairs = [all_ - start for all_, start in zip(logs, starts, strict=True)]
    assert found[0].values["change"] == 0 and found[0].values["+-"] == 0
    assert found[1].values["change"] == pytest.approx(sum(pairs) / 2)
    assert found[1].values["+-"] == pytest.approx(abs(pairs[0] - pairs[1]) / 2)
    assert rows(first)[1].values["change"] == pytest.approx(pairs[0])  # of the seed that both have
    write_csv(tmp_path / "cells.csv", again)
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 5


def test_a_damaged_record_is_made_again(plan, tmp_path):
    place = tmp_path / "out" / "cells"
    place.mkdir(parents=True)
    (place / f"{plan.cells[0].key}.json").write_text('{"status": "fin')
    assert cells.read_record(place / f"{plan.cells[0].key}.json") == {}


def test_an_interruption_leaves_what_is_finished(plan, tmp_path, monkeypatch):
    def interrupt(cell, shared):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "run_cell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out")
    assert list((tmp_path / "out" / "cells").iterdir()) == []


def test_cells_share_what_the_model_writes(place, tmp_path):
    text = YAML.format(text=place / "text.txt").replace("[0, 1]", "[0]")
    text = text.replace(f"  text: {place}/text.txt\n  eval", "  text: self\n  eval")
    text = text.replace("start: {model.train: none}", "some: {model.latent_lr: 1e-3}")
    (tmp_path / "plan.yaml").write_text(text)
    records = run_plan(read_plan(tmp_path / "plan.yaml", str(place / "dense")), tmp_path / "out")
    assert [record["status"] for record in records] == ["finished"] * 2
    assert len(list((tmp_path / "out").glob("self_text-*.safetensors"))) == 1
