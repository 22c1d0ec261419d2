"""Run folders are read whole, cut off or damaged, and nothing is left out in silence."""

import json
import math

import pytest
from run_folders import KINDS, rows, write_head, write_rows, write_run

from nanoquant.product_budget import ProductShape
from nanoquant.report.layers import rank_section
from nanoquant.report.measures import (
    Histogram,
    cell_of,
    latent_histograms,
    layer_codebooks,
    layer_errors,
    layer_ranks,
    measured,
    model_losses,
    phase_memory,
    phase_order,
    phase_seconds,
)
from nanoquant.report.run_files import Run, find_run, number, read_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "out.run")


def test_a_run_is_found_by_its_own_name_and_by_that_of_its_checkpoint(folder):
    (folder.parent / "out").mkdir()
    assert find_run(str(folder)) == find_run(str(folder.parent / "out")) == folder
    assert find_run(f"{folder}/") == folder


def test_a_checkpoint_that_was_never_made_still_names_its_run(folder):
    assert find_run(str(folder.parent / "out")) == folder


@pytest.mark.parametrize("name", ["empty.run", "absent", "file"])
def test_where_no_run_is_the_message_says_what_to_give(tmp_path, name):
    (tmp_path / "empty.run").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="run.json or metrics.jsonl; give OUT or OUT.run"):
        find_run(str(tmp_path / name))


def test_a_whole_run_has_no_problems(folder):
    run = read_run(folder)
    assert (run.problems, run.status, len(run.rows)) == ([], "finished", len(rows()))
    assert run.name == "out"


def test_a_last_line_that_is_cut_in_half_is_left_out_and_said(folder):
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text()[:-30])
    run = read_run(folder)
    assert len(run.rows) == len(rows()) - 1
    assert len(run.problems) == 1 and "cut off" in run.problems[0]


def test_a_last_line_without_a_line_break_counts_when_it_is_whole(folder):
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().rstrip())
    run = read_run(folder)
    assert (len(run.rows), run.problems) == (len(rows()), [])


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[1]",
        b'{"t": 1}',
        b'{"phase": 3}',
        b'{"phase": "model", "step": "two"}',
        b'{"phase": "model", "block": true}',
        b'{"phase": "model", "layer": ["a"]}',
        b'{"phase": "model", "step": 1%s}' % (b"0" * 400),
        b"\xff\xfe\x00",
        b"[" * 20_000,
    ],
)
def test_lines_that_are_no_metrics_are_left_out_and_their_places_said(folder, line):
    file = folder / "metrics.jsonl"
    file.write_bytes(line + b"\n" + file.read_bytes())
    run = read_run(folder)
    assert len(run.rows) == len(rows())
    assert run.problems == ["1 lines of metrics.jsonl are no metrics and left out: 1."]


def test_numbers_that_are_not_finite_are_gaps_and_counted(folder):
    found = rows()
    for row, value in zip(
        [row for row in found if "error" in row], (math.nan, math.inf, None, 10**400), strict=False
    ):
        row["error"] = value
    write_rows(folder, found)
    run = read_run(folder)
    (problem,) = run.problems
    assert "4 of error" in problem
    assert len(list(run.having("error"))) == len([r for r in found if "error" in r]) - 4


@pytest.mark.parametrize("value", [None, True, "1", [1], math.nan, -math.inf, 10**400, 1e200])
def test_what_is_no_finite_number_is_none(value):
    assert number(value) is None


def test_without_run_json_the_metrics_remain_and_the_loss_is_said(folder):
    (folder / "run.json").unlink()
    run = read_run(folder)
    assert run.status == "unknown" and len(run.rows) == len(rows())
    assert "run.json can't be read" in run.problems[0]


def test_without_metrics_the_head_remains_and_the_loss_is_said(folder):
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert run.status == "finished" and not run.rows
    assert "metrics.jsonl can't be read" in run.problems[0]


def test_a_newer_format_is_refused(folder):
    write_head(folder, format=2)
    with pytest.raises(ValueError, match="format 2.*up to 1; upgrade nanoquant"):
        read_run(folder)


@pytest.mark.parametrize("head", [{"figures": [1]}, {"figures": {"report": 3}}, {"seconds": "s"}])
def test_parts_of_run_json_of_the_wrong_type_are_as_good_as_absent(folder, head):
    write_head(folder, **head)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert layer_errors(run) == {} and layer_ranks(run).values == {}
    assert model_losses(run)[0].values == []
    assert run.number("figures", "dense", "perplexity") is None or "seconds" in head


def test_layers_are_named_by_block_and_place_within_it():
    assert cell_of("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert cell_of("transformer.h.12.mlp.experts.4.up") == (12, "mlp.experts.4.up")
    assert cell_of("q_proj", 5) == (5, "q_proj")
    assert cell_of("lm_head") is cell_of(None, 3) is None


def test_errors_come_by_phase_in_the_order_of_the_method(folder):
    grids = layer_errors(read_run(folder))
    assert list(grids) == ["initialize", "block", "model"]
    first, last = grids["initialize"], grids["model"]
    assert first.blocks == [0, 1, 2] and first.kinds == list(KINDS)
    cell = 2, "mlp.down_proj"
    assert last.values[cell] == pytest.approx(1.1 * first.values[cell])


def test_phases_that_are_not_known_come_last():
    assert phase_order(["pack", "model", "calibrate", "pack"]) == ["calibrate", "model", "pack"]


def test_where_no_rows_tell_the_final_figures_do(folder):
    report = {
        "blocks": {"1": {"weight_error": {"mlp.up_proj": 0.25, "x": None}}},
        "ranks": {"model.layers.1.mlp.up_proj": 96},
        "model": {"losses": [3.0, None, 2.0], "held_out": {"0": 4.0, "2": 2.5}},
    }
    write_head(folder, figures={"report": report, "seconds": {"pack": 2}}, seconds={})
    write_rows(folder, [])
    run = read_run(folder)
    assert layer_errors(run)["initialize"].values == {(1, "mlp.up_proj"): 0.25}
    assert layer_ranks(run).values == {(1, "mlp.up_proj"): 96.0}
    train, held = model_losses(run)
    assert (train.steps, held.values) == ([0, 2], [4.0, 2.5])
    assert phase_seconds(run) == {"pack": 2.0}


def test_histograms_whose_lists_do_not_fit_are_left_out(folder):
    good = {"phase": "model", "layer": "a", "step": 3}
    lists = [([0, 1, 2], [5, 6]), ([0, 1], [5, 6]), ([1, 0, 2], [5, 6]), ([0, None, 2], [5, 6])]
    write_rows(folder, [good | {"latent_edges": e, "latent_counts": c} for e, c in lists])
    found = latent_histograms(read_run(folder))
    assert found == {"a": {"model, step 3": Histogram([0.0, 1.0, 2.0], [5.0, 6.0])}}


def test_memory_of_a_phase_is_that_of_run_json_else_the_most_of_its_rows(folder):
    assert phase_memory(read_run(folder)) == {"calibrate": 5e8, "block": 6.2e8, "model": 9e8}
    write_head(folder, memory_bytes={"load": 3, "save": None, "model": 5})
    assert phase_memory(read_run(folder)) == {"load": 3.0, "model": 5.0}


def test_figures_that_rows_tell_stand_in_for_those_of_the_end(folder):
    write_head(folder, status="running")
    told = [("dense", 20.0), ("quantized", 99.0), ("quantized", 98.0), ("other", 1.0)]
    found = [{"phase": "evaluate", "model": who, "perplexity": value} for who, value in told]
    write_rows(folder, found)
    run = read_run(folder)
    assert [measured(run, who, "perplexity") for who in ("dense", "quantized")] == [20.0, 98.0]
    write_head(folder)
    assert measured(read_run(folder), "dense", "perplexity") == 22.67


def test_the_fixture_writes_json_without_nan(folder):
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_codebooks_of_a_run_that_has_not_ended_are_shown_and_newer_figures_win(tmp_path):
    shape = {"group": 8, "widths": [8, 4], "slabs": 2}
    row = {"phase": "initialize", "block": 0, "layer": "model.layers.0.mlp.up_proj", "bits": 1.5}
    run = Run(tmp_path, rows=[row | shape])
    assert layer_codebooks(run) == {(0, "mlp.up_proj"): ProductShape(8, (8, 4), 2)}
    section = rank_section(run)
    assert section.title == "Codebooks of each layer" and not section.missing
    assert section.items[0].rows == [["mlp.up_proj", "8:8+4 x2 (1)", "1.5000"]]
    final = {row["layer"]: {"group": 4, "widths": [6], "slabs": 1}}
    run.head = {"figures": {"report": {"ranks": final}}}
    assert layer_codebooks(run) == {(0, "mlp.up_proj"): ProductShape(4, (6,))}
    assert layer_codebooks(Run(tmp_path)) == {}
