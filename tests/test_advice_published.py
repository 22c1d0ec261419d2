"""Figures are complete, are those that README and rules quote, and never of an unknown model."""

import re
from pathlib import Path

import pytest

from nanoquant.advice.anatomy import anatomy
from nanoquant.advice.catalogue import CONFIGS, smaller_siblings
from nanoquant.advice.options import DENSE, OTHERS, OURS, weight_bytes
from nanoquant.advice.published import TABLES, WT2, figures_of
from nanoquant.benchmark.shapes import model_config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def perplexity(model, option):
    return figures_of(model, option, "perplexity", WT2)[0].value


def test_every_figure_is_of_a_known_model_and_option_and_names_its_source():
    keys = {option.key for option in (*OTHERS, *OURS)}
    for table in TABLES:
        assert table.option in keys and table.values.keys() <= CONFIGS.keys()
        assert table.metric in ("perplexity", "zero-shot")
        assert re.match(r"arXiv \d{4}\.\d{5}|README of ", table.source.citation)
        assert table.source.protocol and all(float(v) > 1 for v in table.values.values())


def test_no_model_has_two_figures_of_one_way():
    seen = [
        (name, t.option, t.metric, t.method, t.source.protocol) for t in TABLES for name in t.values
    ]
    assert len(set(seen)) == len(seen)


def test_figures_of_this_project_are_those_of_the_readme():
    row = r"^\| (dense|`make demo.*?`).*?\|.*?\|.*?\| \**([\d.]+)"
    found = dict(re.findall(row, README, re.M))
    expected = {
        ("bf16", ""): found["dense"],
        ("1.0", "preset fast"): found["`make demo`"],
        ("1.0", "preset best"): found["`make demo PRESET=best`"],
        ("0.8", "preset best, 2 epochs, curvature inputs, scale_lr 1e-2"): found[
            "`make demo PRESET=best BITS=0.8`"
        ],
        ("0.55", "preset best, 2 epochs, curvature inputs, scale_lr 1e-2"): found[
            "`make demo PRESET=best BITS=0.55`"
        ],
        ("0.55", "preset fast"): found["`make demo BITS=0.55`"],
    }
    measured = {
        (f.option, f.method): f.text
        for option in ("bf16", "1.0", "0.8", "0.55")
        for f in figures_of("demo", option)
    }
    assert measured == expected
    assert all(f.kind == "measured" for f in figures_of("demo", "1.0"))


def test_a_smaller_model_in_bf16_beats_a_larger_one_at_one_bit_as_the_rule_says():
    one = next(o for o in OURS if o.key == "1.0")
    small, large = (anatomy(model_config(n, published=CONFIGS)) for n in ("qwen3-1.7b", "qwen3-8b"))
    assert perplexity("qwen3-1.7b", "bf16") < perplexity("qwen3-8b", "1.0")
    sizes = weight_bytes(small, DENSE, "cpu"), weight_bytes(large, one, "cpu")
    assert [round(size / 1e9, 1) for size in sizes] == [3.4, 3.4]


def test_below_one_bit_the_next_smaller_model_is_better_in_all_twelve_cases():
    cases = [
        (larger, smaller_siblings(larger)[0])
        for larger in CONFIGS
        if smaller_siblings(larger)
        and figures_of(larger, "0.55", "perplexity", WT2)
        and figures_of(smaller_siblings(larger)[0], "1.0", "perplexity", WT2)
    ]
    low, one = (next(o for o in OURS if o.key == key) for key in ("0.55", "1.0"))
    for larger, smaller in cases:
        assert perplexity(smaller, "1.0") < perplexity(larger, "0.55")
        sizes = (
            weight_bytes(anatomy(model_config(name, published=CONFIGS)), option, "cpu")
            for name, option in ((smaller, one), (larger, low))
        )
        assert next(sizes) < next(sizes)
    assert len(cases) == 12


@pytest.mark.parametrize("model", [None, "llama-3.1-8b", "qwen3-32b"])
def test_what_nobody_published_is_unknown_not_guessed(model):
    assert not any(figures_of(model, option.key) for option in (*OTHERS, *OURS))
