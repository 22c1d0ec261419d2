"""The command evaluate as a user meets it: records, the dense model beside, comparisons, refusals."""

import json
import shutil

import pytest
import torch
from command_line import call, refused
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.evaluation.command import result_line

pytestmark = pytest.mark.usefixtures("untouched_process")

SMALL = ["--windows", 4, "--length", 32]


def evaluate(capsys, place, *arguments):
    text = ["--text", place / "text.txt", *SMALL]
    code, out, err = call(capsys, "evaluate", *arguments, *text)
    assert code == 0, err
    return out, err


def test_the_dense_model_of_a_checkpoint_stands_beside_it_where_it_is_here(
    place, finished, capsys, monkeypatch, tmp_path
):
    flags = [place / "out", "--json", tmp_path / "a.json"]
    monkeypatch.chdir(place)  # the checkpoint was made here from "dense"
    out, _ = evaluate(capsys, place, *flags)
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["method"], record["dense_model"]) == ("nanoquant", "dense")
    assert record["results"]["text"]["kl"] > 0 and "KL from dense" in out
    evaluate(capsys, place, *flags, "--dense", "none")
    assert json.loads((tmp_path / "a.json").read_text())["dense"] is None
    monkeypatch.chdir(tmp_path)
    _, err = evaluate(capsys, place, *flags)
    assert "the dense model dense is not here; --dense FOLDER" in err
    evaluate(capsys, place, *flags, "--dense", place / "dense")
    assert json.loads((tmp_path / "a.json").read_text())["dense"] == record["dense"]


def test_an_interrupted_evaluation_keeps_what_was_measured(
    place, finished, capsys, tmp_path, monkeypatch
):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanoquant.evaluation.command.greedy_sample", interrupted)
    flags = ["--text", place / "text.txt", *SMALL, "--sample", "the", "--json", tmp_path / "a.json"]
    code, out, _ = call(capsys, "evaluate", place / "dense", *flags)
    record = json.loads((tmp_path / "a.json").read_text())
    assert code == 130 and f"perplexity {record['results']['text']['perplexity']:.4f}" in out


def test_two_records_are_compared_without_a_model(place, finished, capsys, tmp_path, monkeypatch):
    for name in ("dense", "out"):
        file = tmp_path / f"{name}.json"
        evaluate(capsys, place, place / name, "--dense", "none", "--json", file)
    monkeypatch.setattr("nanoquant.evaluation.command.load_model", None)
    files = [tmp_path / "dense.json", tmp_path / "out.json"]
    code, out, _ = call(capsys, "evaluate", "--compare", *files, "--json", tmp_path / "c.json")
    (entry,) = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert code == 0 and f"{entry['mean']:+.4f}" in out and entry["pairs"] == 4
    one, two = (json.loads(file.read_text())["results"]["text"] for file in files)
    assert entry["mean"] == pytest.approx(two["nll_per_token"] - one["nll_per_token"])


def test_models_are_measured_before_they_are_compared(place, finished, capsys, tmp_path):
    record = tmp_path / "dense.json"
    evaluate(capsys, place, place / "dense", "--json", record)
    flags = ["--compare", record, place / "out", "--dense", "none", "--json", tmp_path / "c.json"]
    out, _ = evaluate(capsys, place, *flags)
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["models"] == [str(record), str(place / "out")] and "95% interval" in out
    assert list(found["records"]) == [str(place / "out")]


def test_other_windows_are_refused_before_a_model_is_loaded(
    place, finished, capsys, tmp_path, monkeypatch
):
    record = tmp_path / "dense.json"
    evaluate(capsys, place, place / "dense", "--json", record)
    monkeypatch.setattr("nanoquant.evaluation.command.load_model", None)
    flags = ["--compare", record, place / "out", "--text", place / "text.txt", "--length", 16]
    line = refused(capsys, "evaluate", *flags, "--windows", 4)
    assert "measured by another text: length 32 and 16" in line


@pytest.fixture
def stranger(place, tmp_path):
    """A model whose tokenizer gives other ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["river"])
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "stranger")
    tokenizer.save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


def test_mismatched_tokenizers_are_refused_by_name(place, stranger, capsys, tmp_path, monkeypatch):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for model, file in zip((place / "dense", stranger), files, strict=True):
        evaluate(capsys, place, model, "--json", file)
    line = refused(capsys, "evaluate", "--compare", *files)
    assert f"{files[0]} and {files[1]} have other tokenizers" in line
    monkeypatch.setattr("nanoquant.evaluation.command.load_model", None)
    text = ["--text", place / "text.txt"]
    line = refused(capsys, "evaluate", place / "dense", "--dense", stranger, *text)
    assert "have other tokenizers; give --dense the model it came from" in line


BAD = {
    "nothing": (["MODEL"], "nothing to measure"),
    "no model": (["--text", "TEXT"], "give one MODEL"),
    "both": (["MODEL", "--compare", "MODEL", "MODEL"], "give one MODEL"),
    "one record": (["--compare", "TEXT"], "needs two records or models"),
    "no record": (["--compare", "TEXT", "TEXT"], "can't be read as a record"),
    "model without protocol": (["--compare", "MODEL", "MODEL"], "is no record but a model"),
    "no such model": (
        ["--compare", "MODEL", "none", "--text", "TEXT", "--length", "8"],
        "no folder",
    ),
    "short text": (["MODEL", "--text", "SHORT"], "has 9 tokens, but 64 windows of 512 tokens"),
    "unknown protocol": (["MODEL", "--protocol", "c5"], "no protocol 'c5'; near: c4"),
    "unknown task": (["MODEL", "--zero-shot", "piqua"], "no task 'piqua'; near: piqa"),
    "unknown flag": (["MODEL", "--protocols", "c4"], "flags near --protocols: --protocol"),
    "no data folder": (
        ["MODEL", "--protocol", "c4", "--data", "none"],
        "--data none is not a folder",
    ),
    "data folder without it": (
        ["MODEL", "--protocol", "c4", "--data", "."],
        "split validation in c4",
    ),
    "no such dense model": (
        ["MODEL", "--text", "TEXT", "--dense", "nowhere"],
        "no folder 'nowhere'",
    ),
    "sample of a comparison": (["--compare", "A", "B", "--sample", "the"], "--sample is about one"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(
    arguments, message, place, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("nanoquant.evaluation.command.load_model", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("the river")
    places = {"MODEL": place / "dense", "TEXT": place / "text.txt", "SHORT": tmp_path / "short.txt"}
    assert message in refused(capsys, "evaluate", *(places.get(a, a) for a in arguments))


def test_a_dense_model_of_another_size_is_refused(place, finished, capsys, tmp_path):
    shutil.copytree(place / "dense", tmp_path / "other")
    tiny_llama(vocab_size=144, dtype=torch.bfloat16).save_pretrained(tmp_path / "other")
    text = ["--text", place / "text.txt", *SMALL]
    line = refused(capsys, "evaluate", place / "out", "--dense", tmp_path / "other", *text)
    assert "vocabularies of 128 and 144 tokens" in line


def test_the_line_of_a_task_names_the_split_that_was_scored():
    line = result_line("arc_easy", {"acc": 0.5, "questions": 2376}, {"split": "validation"})
    assert line == "arc_easy: acc 0.5000 on 2,376 questions of the validation split"
