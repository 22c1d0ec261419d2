"""The command bench as a user meets it: figures, and what it refuses."""

import importlib.util
import json

import pytest
import torch
from command_line import call, refused
from tiny_models import tiny_llama

from nanoquant.benchmark import linears, run, speed
from nanoquant.benchmark.config import BenchConfig
from nanoquant.benchmark.linears import DENSE, PACKED
from nanoquant.benchmark.report import plot_roofline, report
from nanoquant.benchmark.setup import make_bench, targets

pytestmark = pytest.mark.usefixtures("untouched_process")

FIGURES = {"implementation", "microseconds", "spread", "weight_bytes", "gb_per_s", "tflop_per_s"}
FIGURES |= {"operations", "ratio_to_dense", "fraction_of_copy", "in_cache", "linears", "tokens"}
WHERE = {"model", "layers", "of_layers", "bits"}
DECODING = {"model", "layers", "of_layers", "arm", "context", "ratio_to_dense", "tokens_per_s"}
DECODING |= {"milliseconds", "spread", "weight_bytes", "peak_bytes"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder that holds nothing but the config.json of a small model."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    wide = {"hidden_size": 256, "intermediate_size": 320}
    tiny_llama(layers=2, dtype=torch.bfloat16, **wide).config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def measured(tiny):
    """Text and figures of one run of all parts."""
    with pytest.MonkeyPatch.context() as patch:
        from nanoquant.cli import main

        lines = []
        patch.setattr("nanoquant.benchmark.command.say", lines.append)
        file = tiny.parent / "bench.json"
        flags = (
            f"--model {tiny} --tokens 1,3 --bits 0.8 --rotate-megabytes 2 --layers 1 "
            f"--context 16 --json {file}"
        )
        assert main(["bench", *flags.split()]) == 0
    return "\n".join(lines), json.loads(file.read_text())


def test_every_figure_is_in_the_json(measured, tiny):
    figures = measured[1]
    assert figures.keys() == {
        "finished",
        "date",
        "versions",
        "device",
        "settings",
        "shapes",
        "chain",
        "model",
        "absent",
    }
    assert {"nanoquant", "torch", "cuda"} <= figures["versions"].keys()
    device = figures["device"]
    assert device.keys() == {
        "name",
        "kind",
        "threads",
        "cache_bytes",
        "rotation_bytes",
        "in_cache",
    } | {
        "copy_gb_per_s",
        "matmul_tflop_per_s",
    }
    assert device["rotation_bytes"] == 2_000_000 and device["copy_gb_per_s"] > 0
    assert figures["settings"]["model"] == str(tiny) and figures["absent"] == []
    shape = FIGURES | WHERE | {"d_out", "d_in", "rank", "relative_error", "kernel"}
    assert {frozenset(row) for row in figures["shapes"]} == {frozenset(shape)}
    assert {frozenset(row) for row in figures["chain"]} == {frozenset(FIGURES | WHERE)}
    assert {frozenset(row) for row in figures["model"]} == {frozenset(DECODING)}


def test_every_case_is_measured_once(measured):
    figures = measured[1]
    names = [DENSE, *PACKED]
    cases = {(r["d_out"], r["tokens"], r["implementation"], r["d_in"]) for r in figures["shapes"]}
    shapes = {(256, 256), (128, 256), (320, 256), (256, 320)}
    assert {(d_out, d_in) for d_out, _, _, d_in in cases} == shapes
    assert len(cases) == len(figures["shapes"]) == len(shapes) * 2 * len(names)
    assert [(r["tokens"], r["implementation"]) for r in figures["chain"]] == [
        (tokens, name) for tokens in (1, 3) for name in names
    ]
    dense, packed = figures["model"]
    assert (dense["arm"], packed["arm"]) == (DENSE, "packed, 0.8 bit")
    assert 0 < packed["weight_bytes"] < dense["weight_bytes"] and dense["ratio_to_dense"] == 1
    assert all(row["peak_bytes"] is None or row["peak_bytes"] > 0 for row in (dense, packed))
    assert packed["tokens_per_s"] == pytest.approx(1e3 / packed["milliseconds"])
    assert {(row["layers"], row["of_layers"]) for row in figures["model"]} == {(1, 2)}


def test_the_text_says_what_was_cut_and_shows_every_row(measured):
    text, figures = measured
    assert text.count("only 1 of 2 layers") == 3
    for part in ("shapes", "chain"):
        for row in figures[part]:
            assert f"{row['microseconds']:.1f}" in text
    for row in figures["model"]:
        assert f"{row['tokens_per_s']:.2f}" in text


def test_what_was_not_measured_is_a_dash_and_a_reason(measured):
    figures = json.loads(json.dumps(measured[1]))
    figures["shapes"][0] |= {"ratio_to_dense": None, "fraction_of_copy": None, "in_cache": None}
    why = {
        "part": "chain",
        "model": "x",
        "bits": 0.8,
        "tokens": 3,
        "what": DENSE,
        "why": "too slow",
    }
    figures["absent"].append(why)
    text = report(figures)
    assert f"chain, x, 0.8 bits, 3 tokens: {DENSE}: too slow" in text
    line = next(line for line in text.splitlines() if line.startswith("256 x 256"))
    assert line.split()[-5] == line.split()[-4] == "-" and line.endswith("cache unknown")


def test_a_plot_is_a_png_with_every_implementation(measured, tmp_path):
    pytest.importorskip("matplotlib")
    plot_roofline(measured[1], str(tmp_path / "roof.png"))
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_implementation_ends_the_run_without_figures(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        linears.PACKED, "operator", lambda x, u, v, s1, *rest: x.new_zeros(len(x), len(s1))
    )
    flags = f"--model {tiny} --tokens 1 --bits 0.8 --parts chain --rotate-megabytes 1".split()
    monkeypatch.setattr(speed, "interleaved", None)
    line = refused(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    assert "operator is wrong: relative error 1 against float64" in line
    assert list(tmp_path.iterdir()) == []


BAD = {
    "unknown model": (["--model", "lama-2-70b"], "no model 'lama-2-70b' (near: llama-2-70b"),
    "seed out of range": (["--seed", str(2**63)], f"seed must be 0 to {2**63 - 1}, got {2**63}"),
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
def stopped(tiny, tmp_path, capsys, monkeypatch):
    """File, and stderr, of a run that was interrupted in the third group of rows."""
    left = iter([run.time_linear] * 2)

    def third_time_unlucky(*arguments):
        try:
            return next(left)(*arguments)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(run, "time_linear", third_time_unlucky)
    flags = f"--model {tiny} --tokens 1 --bits 0.8 --rotate-megabytes 1 --context 16".split()
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


def test_a_finished_file_is_shown_as_the_run_showed_it(measured, tmp_path, capsys):
    text, figures = measured
    assert figures["finished"] is True
    (tmp_path / "b.json").write_text(json.dumps(figures))
    assert call(capsys, "bench", "--show", tmp_path / "b.json")[1].rstrip() == text


def test_a_plot_of_a_file_without_shapes_is_refused(measured, tmp_path, capsys):
    (tmp_path / "b.json").write_text(json.dumps(measured[1] | {"shapes": []}))
    pytest.importorskip("matplotlib")
    line = refused(capsys, "bench", "--show", tmp_path / "b.json", "--plot", tmp_path / "roof.png")
    assert "no linear shapes in it to plot" in line


def test_a_disk_that_is_full_for_a_while_ends_no_run(tiny, tmp_path, capsys, monkeypatch):
    from nanoquant.benchmark import command

    written = []

    def full_at_first(file, figures):
        written.append(figures["finished"])
        if len(written) < 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_json", full_at_first)
    flags = f"--model {tiny} --tokens 1 --bits 0.8 --parts shapes --rotate-megabytes 1".split()
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


def test_roofs_that_would_take_too_long_are_absent_and_so_are_the_rest(tiny, tmp_path, capsys):
    flags = f"--model {tiny} --tokens 1 --bits 0.8 --parts chain --rotate-megabytes 1".split()
    file = tmp_path / "bench.json"
    code, out, _ = call(capsys, "bench", *flags, "--most-seconds", "1e-9", "--json", file)
    figures = json.loads(file.read_text())
    assert (code, figures["chain"], figures["device"]["copy_gb_per_s"]) == (0, [], None)
    assert [item["part"] for item in figures["absent"]] == ["roofs"] * 2 + ["chain"] * (
        1 + len(PACKED)
    )
    assert out.count("--most-seconds allows") == 3 + len(PACKED)


def test_a_model_whose_layers_the_operator_refuses_is_absent(tiny, tmp_path, capsys, monkeypatch):
    def refuses(*arguments):
        raise ValueError("not on this machine")

    monkeypatch.setitem(linears.PACKED, "operator", refuses)
    flags = f"--model {tiny} --bits 0.8 --parts model --context 16".split()
    monkeypatch.setattr("nanoquant.benchmark.run.time_arms", lambda arms, absent: {})
    code, out, _ = call(capsys, "bench", *flags)
    assert code == 0 and "packed, 0.8 bit: refused: not on this machine" in out


def test_config_only_measures_one_model_without_tables_of_shapes():
    config = BenchConfig(config_only="llama-2-70b")
    assert (config.models, config.parts_asked) == (["llama-2-70b"], ["chain", "model"])


def test_defaults_cover_the_published_models_bits_and_tokens():
    config = BenchConfig()
    assert config.models == ["llama-2-7b", "llama-2-70b", "qwen3-8b", "demo"]
    assert config.numbers("bits", float) == [1.0, 0.8, 0.55]
    tokens = config.numbers("tokens", int)
    assert (min(tokens), max(tokens)) == (1, 2048)


def test_weights_rotate_over_four_times_the_last_cache_where_memory_reaches(tiny, monkeypatch):
    monkeypatch.setattr("nanoquant.benchmark.setup.cache_bytes", lambda device: 70 * 10**6)
    monkeypatch.setattr("nanoquant.benchmark.setup.available_bytes", lambda device: 10**12)
    config = BenchConfig(model=str(tiny), bits="0.8")
    bench = make_bench(config, targets(config), torch.device("cpu"))
    assert bench.signs.asked == bench.reals.asked == 280 * 10**6
    assert bench.in_cache(bench.signs.asked) is False
    monkeypatch.setattr("nanoquant.benchmark.setup.available_bytes", lambda device: 8 * 10**6)
    bench = make_bench(config, targets(config), torch.device("cpu"))
    assert bench.signs.asked == 2 * 10**6 and bench.in_cache(bench.signs.asked) is True


def test_a_model_that_does_not_fit_is_absent_not_estimated(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("nanoquant.benchmark.run.available_bytes", lambda device: 1000)
    flags = f"--model {tiny} --tokens 1 --bits 0.8 --parts model --context 16".split()
    code, out, _ = call(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert (code, figures["model"], len(figures["absent"])) == (0, [], 2)
    assert "do not fit into 1,000 free bytes" in out
