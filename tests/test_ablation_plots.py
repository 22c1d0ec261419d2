"""Plots of an ablation are files with lines in them."""

import pytest

from nanoquant.ablation.plots import _errors, _numbers, write_plots
from nanoquant.ablation.table import rows

pytest.importorskip("matplotlib")


def record(bits, phases, perplexity):
    return {
        "choices": {"budget.bits": bits, "phases": phases},
        "status": "finished" if perplexity else "failed",
        "error": None if perplexity else "ValueError: no",
        "perplexity": perplexity,
        "dense_perplexity": 10.0,
        "bits": float(bits),
        "errors": {"initialize": 0.4, "model": 0.5},
        "divergence": None,
        "seconds": 1.0,
    }


def test_every_axis_with_two_choices_has_a_plot(tmp_path):
    records = [record("1.0", "all", 20.0), record("0.8", "all", 30.0), record("0.55", "all", None)]
    files = write_plots(tmp_path, rows(records), records)
    assert [file.name for file in files] == ["excess_budget_bits.png", "errors.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert write_plots(tmp_path, rows(records[2:]), records[2:]) == []


def test_an_error_stands_over_its_own_phase_where_another_phase_has_none():
    axes = pytest.importorskip("matplotlib.figure").Figure().add_subplot()
    _errors(axes, [record("1.0", "all", 20.0)])
    (line,) = axes.get_lines()
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert [names[place] for place in line.get_xdata()] == ["initialize", "model"]


def test_labels_that_are_no_numbers_are_places():
    assert _numbers(["1.0", "0.8"]) == [1.0, 0.8] and _numbers(["all", "1"]) is None
