"""A plan is checked as a whole before anything runs, and every cell has a name of its own."""

import pytest

from nanoquant.ablation import plan as module
from nanoquant.ablation.plan import read_plan

BASE = "base: {preset: paper, text: t.txt, eval_text: e.txt}\n"
AXES = """axes:
  budget.bits: [1.0, 0.8]
  phases:
    start: {block.dense_epochs: 0, model.train: none}
    all: {}
  run.seed: [0, 1]
"""
SHORT = "axes: {budget.bits: [1.0], run.seed: [0, 1]}"


@pytest.fixture
def plan(tmp_path):
    def read(text, model="MODEL", **changes):
        (tmp_path / "plan.yaml").write_text(text)
        return read_plan(tmp_path / "plan.yaml", model, changes)

    return read


def test_the_example_of_the_documentation_is_a_plan(plan):
    found = plan(module.__doc__.partition("::\n")[2])
    assert len(found.cells) == 8 and list(found.axes) == ["budget.bits", "phases", "run.seed"]


def test_a_grid_has_every_combination_with_its_settings(plan):
    found = plan(BASE + AXES)
    assert len(found.cells) == 8 and found.axes["phases"] == ["start", "all"]
    first, last = found.cells[0], found.cells[-1]
    assert first.choices == {"budget.bits": "1.0", "phases": "start", "run.seed": "0"}
    assert (first.config.model.train, first.config.block.dense_epochs) == ("none", 0)
    assert (last.config.budget.bits, last.config.model.train, last.config.run.seed) == (
        0.8,
        "scales",
        1,
    )
    assert last.config.preset == "paper" and last.job.eval_text == "e.txt"


def test_each_changes_one_axis_at_a_time_for_every_seed(plan):
    cells = plan(BASE + "mode: each\n" + AXES).cells
    assert [tuple(cell.choices.values()) for cell in cells] == [
        *(("1.0", phases, seed) for phases in ("start", "all") for seed in "01"),
        *(("0.8", "start", seed) for seed in "01"),
    ]


def test_names_of_cells_are_stable_and_follow_all_that_decides(plan):
    keys = [cell.key for cell in plan(BASE + SHORT).cells]
    assert len(set(keys)) == 2 and keys == [cell.key for cell in plan(BASE + SHORT).cells]
    assert keys[0].startswith("bits-1.0-seed-0-")
    others = plan(BASE + SHORT, model="OTHER"), plan(BASE + SHORT, **{"admm.iterations": "7"})
    for other in others:
        assert not set(keys) & {cell.key for cell in other.cells}
    spelled = plan(BASE + SHORT, **{"admm.refit_sweeps": 0})  # what the preset says anyway
    assert keys == [cell.key for cell in spelled.cells]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: [1", "can't be read as YAML"),
        ("base: {}", "has no axes"),
        (BASE + "axis: {}\n" + AXES, "unknown keys axis"),
        (BASE + "mode: all\n" + AXES, "mode 'all'; it takes base, axes and mode, grid or each"),
        (BASE + "axes: {budget.bits: 1.0}", "axis budget.bits needs a list of values"),
        (BASE + "axes: {budget.bit: [1.0]}", "the cell budget.bit 1.0: .*flags near --budget.bit"),
        (BASE + "axes: {budget.bits: [1.0, -1]}", "the cell budget.bits -1: bits must be above 0"),
        (BASE + "axes: {a: {x: {model.windows: [8, 9]}}}", r"Got value: \[8, 9\]"),
        (BASE + "axes: {sample: [the]}", "sample has no use here"),
        ("base: {text: t}\naxes: {run.seed: [0]}", "needs eval_text"),
    ],
)
def test_a_bad_plan_is_refused_by_name(text, message, plan):
    with pytest.raises(ValueError, match=message):
        plan(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.yaml can't be read"):
        read_plan(tmp_path / "none.yaml", "MODEL")


def test_a_cell_may_mix_texts(plan):
    found = plan(SHORT + "\nbase: {text: [a.txt=2, b.txt=1], eval_text: e.txt}\n")
    assert [cell.job.text for cell in found.cells] == [["a.txt=2", "b.txt=1"]] * 2
