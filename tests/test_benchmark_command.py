"""What the command bench refuses, what a stopped run leaves, and how that is shown."""

import importlib.util
import json

import pytest
from command_line import call, refused

from nanoquant.benchmark import command, run

pytestmark = pytest.mark.usefixtures("untouched_process")

BAD = {
    "unknown model": (["--model", "lama-2-70b"], "no model 'lama-2-70b' (near: llama-2-70b"),
    "seed out of range": (["--seed", str(2**63)], f"seed must be 0 to {2**63 - 1}, got {2**63}"),
    "bits of the embedding": (["--embedding-bits", "3"], "must be 16, 8 or 4, got 3"),
    "two ways to name a model": (["--config-only", "demo"], "name models both"),
    "no model": (["--model", ","], "give at least one model"),
    "folder without config": (["--model", "."], "there is no model '.'"),
    "bits too large": (["--bits", "9"], "bits=9.0 can't be met"),
    "no bits": (["--bits", "0"], "bits must be numbers above 0, separated by commas, got '0'"),
    "bits no number": (["--bits", "one"], "bits must be numbers above 0"),
    "bits not finite": (["--bits", "nan"], "bits must be numbers above 0"),
    "no tokens": (["--tokens", "0"], "tokens must be whole numbers of at least 1"),
    "half a token": (["--tokens", "1,1.5"], "tokens must be whole numbers of at least 1"),
    "too few repeats": (["--repeats", "3"], "repeats must be at least 20, got 3"),
    "no layers": (["--layers", "0"], "layers must be 1 to 30"),
    "unknown part": (["--parts", "shapes,speed"], "parts are shapes, chain, model"),
    "context beyond the model": (
        ["--context", "8192", "--parts", "model"],
        "but demo has 8192; give a context of at most 8166",
    ),
    "figures and plot in one file": (["--json", "a", "--plot", "a"], "are the same file, a"),
    "no file to show": (["--show", "b.json"], "--show measures nothing, so --model can't go with"),
    "no context": (["--context", "0"], "context must be above 0"),
    "negative rotation": (["--rotate-megabytes", "-1"], "rotate_megabytes must be at least 1"),
    "rotation larger than memory": (
        ["--rotate-megabytes", "900000000"],
        "smaller --rotate-megabytes",
    ),
    "unknown device": (["--device", "tpu"], "auto, cpu, gpu or cuda, got 'tpu'"),
    "no folder for figures": (["--json", "nowhere/bench.json"], "there is no folder nowhere"),
    "no folder for the plot": (["--plot", "nowhere/bench.png"], "--plot nowhere/bench.png"),
    "plot without shapes": (["--plot", "a.png", "--parts", "chain"], "a plot shows linear shapes"),
    "unknown flag": (["--token", "1"], "flags near --token: --tokens"),
}


def test_config_only_takes_one_model_and_leaves_shapes_out(capsys):
    line = refused(capsys, "bench", "--config-only", "demo,qwen3-8b")
    assert "--config-only takes one model, got 'demo,qwen3-8b'" in line
    line = refused(capsys, "bench", "--config-only", "demo", "--parts", "shapes")
    assert "--config-only leaves shapes out" in line


SHOWN = {
    "no such file": (None, "there is no such file"),
    "no JSON": ("{", "can't be read as JSON"),
    "no object": ("[]", "must hold a JSON object"),
    "another file": ('{"date": 1}', "it lacks absent, chain, device"),
}


@pytest.mark.parametrize(("text", "message"), SHOWN.values(), ids=SHOWN)
def test_a_file_that_holds_no_figures_is_not_shown(text, message, capsys, tmp_path):
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    assert message in refused(capsys, "bench", "--show", tmp_path / "b.json")


@pytest.fixture
def stopped(config_folder, tmp_path, capsys, monkeypatch):
    """File, and stderr, of a run that was interrupted in the third group of rows."""
    left = iter([run.time_linear] * 2)

    def third_time_unlucky(*arguments):
        try:
            return next(left)(*arguments)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(run, "time_linear", third_time_unlucky)
    flags = (
        f"--model {config_folder} --tokens 1 --bits 0.8 --rotate-megabytes 1 --context 16".split()
    )
    code, out, err = call(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    assert (code, out) == (130, "")
    return tmp_path / "bench.json", err


def test_an_interrupted_run_leaves_what_it_had_measured_and_says_where(stopped):
    file, err = stopped
    figures = json.loads(file.read_text())
    assert figures["finished"] is False and figures["device"]["copy_gb_per_s"] > 0
    assert len({(row["d_out"], row["d_in"]) for row in figures["shapes"]}) == 2
    assert (figures["chain"], figures["model"]) == ([], [])
    assert f"nanoquant bench --show {file}" in err


def test_what_an_interrupted_run_left_is_shown_and_plotted(stopped, capsys):
    pytest.importorskip("matplotlib")
    file, plot = stopped[0], stopped[0].with_suffix(".png")
    code, out, err = call(capsys, "bench", "--show", file, "--plot", plot)
    assert (code, err) == (0, "") and "unfinished: only what was measured" in out
    for row in json.loads(file.read_text())["shapes"]:
        assert f"{row['microseconds']:.1f}" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_finished_file_is_shown_as_the_run_showed_it(bench_run, tmp_path, capsys):
    text, figures = bench_run
    assert figures["finished"] is True
    (tmp_path / "b.json").write_text(json.dumps(figures))
    assert call(capsys, "bench", "--show", tmp_path / "b.json")[1].rstrip() == text


def test_a_plot_of_a_file_without_shapes_is_refused(bench_run, tmp_path, capsys):
    (tmp_path / "b.json").write_text(json.dumps(bench_run[1] | {"shapes": []}))
    pytest.importorskip("matplotlib")
    line = refused(capsys, "bench", "--show", tmp_path / "b.json", "--plot", tmp_path / "roof.png")
    assert "no linear shapes in it to plot" in line


def test_a_disk_that_is_full_for_a_while_ends_no_run(config_folder, tmp_path, capsys, monkeypatch):
    written = []

    def full_at_first(file, figures):
        written.append(figures["finished"])
        if len(written) < 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full_at_first)
    flags = (
        f"--model {config_folder} --tokens 1 --bits 0.8 --parts shapes --rotate-megabytes 1".split()
    )
    code, out, err = call(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    assert code == 0 and err.count("can't be written now: [Errno 28]") == 2
    assert written == [False] * 4 + [True]


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_answered_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "bench", "--model", "demo", *flags)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    line = refused(capsys, "bench", "--model", "demo", "--plot", "roof.png")
    assert "pip install 'nanoquant[plots]'" in line
