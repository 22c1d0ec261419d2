"""The command bench as a user meets it: every figure, once, right first."""

import json

import pytest
import torch
from command_line import call, refused

from nanoquant.benchmark import linears, run, speed
from nanoquant.benchmark.config import BenchConfig
from nanoquant.benchmark.linears import DENSE, LOOKED_UP, PACKED, SHARED
from nanoquant.benchmark.report import plot_roofline, report
from nanoquant.benchmark.setup import make_bench, targets

pytestmark = pytest.mark.usefixtures("untouched_process")

FIGURES = {"implementation", "microseconds", "spread", "weight_bytes", "gb_per_s", "tflop_per_s"}
FIGURES |= {"operations", "ratio_to_dense", "fraction_of_copy", "in_cache", "linears", "tokens"}
WHERE = {"model", "layers", "of_layers", "bits"}
DECODING = {"model", "layers", "of_layers", "arm", "context", "ratio_to_dense", "tokens_per_s"}
DECODING |= {"milliseconds", "spread", "weight_bytes", "peak_bytes"}


def test_every_figure_is_in_the_json(bench_run, config_folder):
    figures = bench_run[1]
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
    assert figures["settings"]["model"] == str(config_folder) and figures["absent"] == []
    shape = FIGURES | WHERE | {"d_out", "d_in", "rank", "codebooks", "relative_error", "kernel"}
    assert {frozenset(row) for row in figures["shapes"]} == {frozenset(shape)}
    assert {frozenset(row) for row in figures["chain"]} == {frozenset(FIGURES | WHERE)}
    assert {frozenset(row) for row in figures["model"]} == {frozenset(DECODING)}


def test_every_case_is_measured_once(bench_run):
    figures = bench_run[1]
    names = [DENSE, *PACKED, *LOOKED_UP]
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


def test_the_text_says_what_was_cut_and_shows_every_row(bench_run):
    text, figures = bench_run
    assert text.count("only 1 of 2 layers") == 3
    for part in ("shapes", "chain"):
        for row in figures[part]:
            assert f"{row['microseconds']:.1f}" in text
    for row in figures["model"]:
        assert f"{row['tokens_per_s']:.2f}" in text


def test_what_was_not_measured_is_a_dash_and_a_reason(bench_run):
    figures = json.loads(json.dumps(bench_run[1]))
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


def test_a_plot_is_a_png_with_every_implementation(bench_run, tmp_path):
    pytest.importorskip("matplotlib")
    plot_roofline(bench_run[1], str(tmp_path / "roof.png"))
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_implementation_ends_the_run_without_figures(
    config_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(
        linears.PACKED, "operator", lambda x, u, v, s1, *rest: x.new_zeros(len(x), len(s1))
    )
    flags = (
        f"--model {config_folder} --tokens 1 --bits 0.8 --parts chain --rotate-megabytes 1".split()
    )
    monkeypatch.setattr(speed, "interleaved", None)
    line = refused(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    assert "operator is wrong: relative error 1 against float64" in line
    assert list(tmp_path.iterdir()) == []


def test_on_a_gpu_linears_of_the_same_tensor_are_checked_first_and_timed_together(
    config_folder, tmp_path, capsys, monkeypatch
):
    gpu, original = torch.device("cuda"), run.launches
    monkeypatch.setattr(run, "launches", lambda target, bits, device: original(target, bits, gpu))
    flags = f"--model {config_folder} --tokens 1,17 --bits 0.8 --parts chain --rotate-megabytes 1".split()
    code, _, _ = call(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    rows = json.loads((tmp_path / "bench.json").read_text())["chain"]
    assert code == 0 and [(row["tokens"], row["implementation"]) for row in rows] == [
        *((1, name) for name in (DENSE, *PACKED, *LOOKED_UP, SHARED)),
        *((17, name) for name in (DENSE, *PACKED, *LOOKED_UP)),
    ]
    wrong = "nanoquant.benchmark.correctness.binary_low_rank_linears"
    monkeypatch.setattr(wrong, lambda x, u, v, s1, *rest: [x.new_zeros(len(x), len(s)) for s in s1])
    monkeypatch.setattr(speed, "interleaved", None)
    monkeypatch.setattr(run, "time_chain", None)
    assert f"{SHARED} is wrong: relative error 1" in refused(capsys, "bench", *flags)


def test_roofs_that_would_take_too_long_are_absent_and_so_are_the_rest(
    config_folder, tmp_path, capsys
):
    flags = (
        f"--model {config_folder} --tokens 1 --bits 0.8 --parts chain --rotate-megabytes 1".split()
    )
    file = tmp_path / "bench.json"
    code, out, _ = call(capsys, "bench", *flags, "--most-seconds", "1e-9", "--json", file)
    figures = json.loads(file.read_text())
    assert (code, figures["chain"], figures["device"]["copy_gb_per_s"]) == (0, [], None)
    assert [item["part"] for item in figures["absent"]] == ["roofs"] * 2 + ["chain"] * (
        1 + len(PACKED | LOOKED_UP)
    )
    assert out.count("--most-seconds allows") == 3 + len(PACKED | LOOKED_UP)


def test_a_model_whose_layers_the_operator_refuses_is_absent(
    config_folder, tmp_path, capsys, monkeypatch
):
    def refuses(*arguments):
        raise ValueError("not on this machine")

    monkeypatch.setitem(linears.PACKED, "operator", refuses)
    flags = f"--model {config_folder} --bits 0.8 --parts model --context 16".split()
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


def test_weights_rotate_over_four_times_the_last_cache_where_memory_reaches(
    config_folder, monkeypatch
):
    monkeypatch.setattr("nanoquant.benchmark.setup.cache_bytes", lambda device: 70 * 10**6)
    monkeypatch.setattr("nanoquant.benchmark.setup.available_bytes", lambda device: 10**12)
    config = BenchConfig(model=str(config_folder), bits="0.8")
    bench = make_bench(config, targets(config), torch.device("cpu"))
    assert bench.signs.asked == bench.reals.asked == 280 * 10**6
    assert bench.in_cache(bench.signs.asked) is False
    monkeypatch.setattr("nanoquant.benchmark.setup.available_bytes", lambda device: 8 * 10**6)
    bench = make_bench(config, targets(config), torch.device("cpu"))
    assert bench.signs.asked == 2 * 10**6 and bench.in_cache(bench.signs.asked) is True


def test_packed_models_may_have_an_embedding_of_fewer_bits(config_folder, tmp_path, capsys):
    flags = (
        f"--model {config_folder} --bits 0.8 --parts model --context 16 --embedding-bits 8".split()
    )
    code, out, _ = call(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    dense, packed = json.loads((tmp_path / "bench.json").read_text())["model"]
    assert (code, dense["arm"], packed["arm"]) == (0, DENSE, "packed, 0.8 bit, embedding 8 bit")
    assert packed["arm"] in out and packed["weight_bytes"] < dense["weight_bytes"] / 2


def test_a_model_that_does_not_fit_is_absent_not_estimated(
    config_folder, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("nanoquant.benchmark.run.available_bytes", lambda device: 1000)
    flags = f"--model {config_folder} --tokens 1 --bits 0.8 --parts model --context 16".split()
    code, out, _ = call(capsys, "bench", *flags, "--json", tmp_path / "bench.json")
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert (code, figures["model"], len(figures["absent"])) == (0, [], 2)
    assert "do not fit into 1,000 free bytes" in out
