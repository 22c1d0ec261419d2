"""evaluate --baselines and --table: records, resumption, one table, one plot, and what is refused."""

import importlib.util
import json

import pytest
import torch
from command_line import WORDS, call, refused
from transformers import AutoModelForCausalLM

from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.records import read_comparable, row_of, rows_of
from nanoquant.baselines.registry import BASELINES, check_shapes
from nanoquant.baselines.report import draw_panel, pareto_front, plot_pareto, records_table
from nanoquant.baselines.run import BaselineRuns, Measurement, chosen_names
from nanoquant.cli import main
from nanoquant.evaluation.record import prepare_windows
from nanoquant.evaluation.request import EvaluationRequest
from nanoquant.sources import load_tokenizer

pytestmark = pytest.mark.usefixtures("untouched_process")

NAMES = ("bf16", "int8", "rtn1", "awq3", "sign-svd@1.9")
MEASURE = ["--windows", 4, "--length", 32]
BASELINE = ["--baseline.group-size", 32, "--baseline.bits", 2.0, "--baseline.length", 32]


def flags(place, out, names=None):
    text, names = place / "text.txt", names or ",".join(NAMES)
    flags = ["evaluate", place / "dense", "--text", text, *MEASURE, "--baselines", names]
    return [*flags, *BASELINE, "--baseline.text", place / "train.txt", "--out", out]


@pytest.fixture(scope="module")
def ran(place, tmp_path_factory):
    """Folder of records."""
    folder = tmp_path_factory.mktemp("baselines")
    (place / "train.txt").write_text(WORDS.upper() * 50)
    file = folder / "all.json"
    assert main([str(f) for f in [*flags(place, folder / "out"), "--json", file]]) == 0
    return folder


def records(folder):
    return {name: json.loads((folder / "out" / f"{name}.json").read_text()) for name in NAMES}


def test_each_baseline_leaves_a_record_beside_the_dense_model(ran):
    found = records(ran)
    for name, record in found.items():
        figures, dense = record["results"]["text"], record["dense"]["text"]
        assert record["method"] == name
        assert len(figures["per_window"]) == len(dense["per_window"]) == 4
        assert record["file_bytes"] == record["bits"]["bytes_on_disk"]
        assert dense == found["bf16"]["dense"]["text"]
    same = found["bf16"]["results"]["text"]
    assert same["perplexity"] == found["bf16"]["dense"]["text"]["perplexity"]
    assert (same["kl"], same["top1"]) == (0, 1)
    assert found["rtn1"]["results"]["text"]["kl"] > found["int8"]["results"]["text"]["kl"] > 0
    assert found["sign-svd@1.9"]["bits"]["body_bits_per_weight"] <= 1.9
    assert found["rtn1"]["bits"]["bytes_on_disk"] < found["awq3"]["bits"]["bytes_on_disk"]
    assert found["bf16"]["bits"]["body_bits_per_weight"] == 16


def test_the_json_of_a_run_has_every_printed_figure(ran):
    written = json.loads((ran / "all.json").read_text())
    assert written["records"] == records(ran)
    assert [row["name"] for row in written["rows"]] == list(NAMES)


def test_what_is_finished_is_not_computed_again(place, ran, capsys, monkeypatch):
    done = []
    run = BaselineRuns.run
    monkeypatch.setattr(BaselineRuns, "run", lambda *args: done.append(args[1]) or run(*args))
    before = {file: file.read_text() for file in (ran / "out").iterdir()}
    (ran / "out" / "rtn1.json").unlink()
    code, out, err = call(capsys, *flags(place, ran / "out"))
    assert (code, done) == (0, ["rtn1"])
    assert "int8 finished before" in err and "baseline 3 of 5: rtn1 runs" in err
    again = {file: file.read_text() for file in (ran / "out").iterdir()}
    changed = [file.name for file in before if again[file] != before[file]]
    assert changed in ([], ["rtn1.json"])  # its seconds differ
    assert len(out.splitlines()) == 2 + len(NAMES)


def test_a_setting_that_a_baseline_does_not_read_does_not_undo_it(place, ran, capsys):
    wanted = flags(place, ran / "out", "int8,rtn1")
    assert call(capsys, *wanted, "--baseline.bits", 1.7)[0] == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [(["--baseline.windows", 2], "settings"), (["--windows", 3], "request")],
)
def test_a_record_of_another_run_is_not_taken_for_this_one(place, ran, capsys, change, named):
    line = refused(capsys, *flags(place, ran / "out", "awq3"), *change)
    assert f"awq3.json is the record of another run ({named} differ); give another --out" in line


def test_the_dense_weights_stay_as_they_are(ran, place):
    model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype="auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    request = EvaluationRequest(text=str(place / "text.txt"), windows=2, length=32)
    tokenizer = load_tokenizer(place / "dense")
    windows = prepare_windows(request, tokenizer, "llama")
    what = Measurement(name="dense", tokenizer=tokenizer, request=request, windows=windows)
    first, second = BaselineRuns(model, what, BaselineConfig())(["rtn1", "rtn1"])
    assert first["results"] == second["results"]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_records_make_one_table_in_the_order_given(place, ran, capsys):
    plain = ran / "plain.json"
    text = ["--text", place / "text.txt", *MEASURE]
    assert call(capsys, "evaluate", place / "dense", *text, "--json", plain)[0] == 0
    files = [plain, *(ran / "out" / f"{name}.json" for name in NAMES)]
    code, out, err = call(capsys, "evaluate", "--table", *files, "--json", ran / "table.json")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == "method body bits model bits MB perplexity text KL text".split()
    assert [line.split()[0] for line in lines[2:]] == ["dense", *NAMES]
    assert lines[2].split()[1:4] == ["dense", "-", "16.0000"]
    rows = json.loads((ran / "table.json").read_text())["rows"]
    for line, row in zip(lines[2:], rows, strict=True):
        assert f"{row['perplexity']['text']:.2f}" in line


def test_the_table_shows_the_mean_of_tasks_where_there_is_one(ran):
    one, two = (records(ran)[name] for name in ("int8", "rtn1"))
    one["zero_shot_mean"]["model"] = {"acc": 0.5, "acc_stderr": 0.013, "tasks": ["piqa"]}
    two["results"]["text"]["perplexity"] = None  # JSON has no infinity
    lines = records_table([one, two]).splitlines()
    assert lines[0].endswith("zero-shot   +-")
    assert lines[2].split()[-2:] == ["50.0", "1.3"] and lines[3].split()[-2:] == ["-", "-"]
    assert lines[3].split()[4] == "-"


def test_models_of_one_name_are_told_apart_by_the_whole_name(ran):
    one, two, three = (dict(records(ran)["int8"], model=f"{folder}/m") for folder in "abc")
    three["method"] = "nanoquant"
    assert [row.name for row in rows_of([one, two, three])] == [
        "int8 a/m",
        "int8 b/m",
        "nanoquant m",
    ]


def test_the_front_holds_what_nothing_beats_in_both():
    points = [(4.0, 1.0), (1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 1.5)]
    assert pareto_front(points) == [1, 3, 0]


def test_the_plot_is_a_png_of_all_protocols(ran, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [ran / "out" / f"{name}.json" for name in NAMES]
    plot = tmp_path / "pareto.png"
    assert call(capsys, "evaluate", "--table", *files, "--plot", plot)[0] == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = read_comparable([str(file) for file in files])
    for record in found:
        record["results"]["c4"] = record["results"]["text"]
    found[0]["results"]["c4"] = {"perplexity": None}
    plot_pareto(found, str(tmp_path / "two.png"))
    assert (tmp_path / "two.png").stat().st_size > plot.stat().st_size


def test_a_ruined_model_is_named_and_not_drawn(ran):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    rows = [row_of(record) for record in records(ran).values()]
    for row, perplexity in zip(rows, (20.0, 21.0, 1e7, 1999.0, 2001.0), strict=True):
        row.perplexity["text"] = perplexity
    axes = figure.add_subplot()
    draw_panel(axes, "text", rows)
    assert {text.get_text() for text in axes.texts} == {"bf16", "int8", "awq3"}
    assert "above 100 times the best: rtn1 1.0e+07, sign-svd@1.9 2001.00" in axes.get_title()


def test_all_means_what_runs_with_what_is_given():
    running = [name for name, baseline in BASELINES.items() if baseline.apply]
    assert chosen_names("all", BaselineConfig(text="t")) == running
    without = chosen_names("all", BaselineConfig())
    assert set(running) - set(without) == {"awq4", "awq3", "awq2", "nanoquant-init"}
    assert chosen_names("int8, rtn1,int8", BaselineConfig()) == ["int8", "rtn1"]


BAD = {
    "name": ("--baselines int7", "there is no baseline 'int7'; nearest: int"),
    "no name": ("--baselines ,", "give at least one baseline, or all: bf16"),
    "text": ("--baselines awq2", "awq2 needs calibration text"),
    "missing": ("--baselines gptq4", "gptq4 is not available: torchao 0.18 has GPTQ"),
    "sample": ("--baselines int8 --sample x", "--baselines is about one dense MODEL"),
    "out": ("--out x", "--out is for --baselines"),
    "plot": ("--plot x.png", "--plot is for --table or --baselines"),
    "groups": ("--baselines bf16,int4 --out x", "group_size=64 does not divide"),
    "bits": ("--baselines bf16,sign-svd@0.3 --out x", "bits=0.3 can't be met with these shapes"),
    "settings": ("--baselines int4 --baseline.group-size 7", "group_size must be one of 32, 64"),
}


@pytest.mark.parametrize(("more", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_answered_in_one_line(place, capsys, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    wanted = ["evaluate", place / "dense", "--text", place / "text.txt", *MEASURE, *more.split()]
    code, out, err = call(capsys, *wanted)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sign-svd", "dual-svid"])
def test_bits_beyond_full_rank_are_refused_where_an_svd_has_no_more(name):
    shapes = {"a": (256, 256), "b": (512, 256)}
    check_shapes(f"{name}@1.5", shapes, BaselineConfig(text="text"))
    with pytest.raises(
        ValueError, match=r"bits=2\.0 is 0\.\d+ more than full rank.*at most 1\.\d+"
    ):
        check_shapes(f"{name}@2.0", shapes, BaselineConfig(text="text"))
    check_shapes("nanoquant-init@2.0", shapes, BaselineConfig(text="text"))


def test_nothing_to_measure_is_refused(place, capsys):
    line = refused(capsys, "evaluate", place / "dense", "--baselines", "int8")
    assert "nothing to measure" in line


def test_the_text_of_the_evaluation_is_no_calibration_text(place, capsys):
    text = place / "text.txt"
    wanted = ["evaluate", place / "dense", "--text", text, "--baselines", "awq2"]
    assert "is both the calibration" in refused(capsys, *wanted, "--baseline.text", text)
    same = text.parent / ".." / text.parent.name / text.name
    assert "is both the calibration" in refused(capsys, *wanted, "--baseline.text", same)


def test_a_folder_for_records_that_can_not_be_made_is_refused_before_any_work(place, capsys):
    wanted = ["evaluate", place / "dense", "--text", place / "text.txt", *MEASURE]
    line = refused(capsys, *wanted, "--baselines", "int8", "--out", place / "text.txt" / "out")
    assert "--out" in line and "is a file; give a folder" in line


def test_a_quantized_model_has_no_baselines(place, finished, capsys):
    text = ["--text", place / "text.txt", *MEASURE]
    line = refused(capsys, "evaluate", place / "out", *text, "--baselines", "int8")
    assert "baselines start from dense weights" in line


def test_files_that_are_no_records_or_measured_otherwise_are_refused(ran, capsys, tmp_path):
    good, other = ran / "out" / "int8.json", tmp_path / "other.json"
    record = json.loads(good.read_text())
    record["protocols"]["text"]["length"] = 64
    other.write_text(json.dumps(record))
    line = refused(capsys, "evaluate", "--table", good, other)
    assert "measured by another text: length 32 and 64" in line
    record["tokenizer"]["sha256"] = "another"
    other.write_text(json.dumps(record))
    assert "have other tokenizers" in refused(capsys, "evaluate", "--table", good, other)
    assert "holds several records" in refused(capsys, "evaluate", "--table", good, ran / "all.json")
    other.write_text("{}")
    assert "is no record" in refused(capsys, "evaluate", "--table", good, other)
    assert "can't be read" in refused(capsys, "evaluate", "--table", good, tmp_path / "none.json")


def test_a_plot_without_matplotlib_is_refused_before_any_work(place, ran, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    line = refused(capsys, *flags(place, ran / "other"), "--plot", ran / "pareto.png")
    assert "pip install 'nanoquant[plots]'" in line and not (ran / "other").exists()
