"""What a record holds, for any model in memory, and what a request refuses."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer

from nanoquant.evaluation import record as module
from nanoquant.evaluation.record import (
    evaluate_model,
    make_record,
    phase_names,
    prepare_windows,
    result_table,
)
from nanoquant.evaluation.request import EvaluationRequest

WORDS = "the river runs over stone and light falls on an old town "


@pytest.fixture
def request_of_text(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 20)
    return EvaluationRequest(text=str(tmp_path / "text.txt"), windows=4, length=32)


def other_model():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_perplexity_is_that_of_the_loss_of_transformers(build, request_of_text):
    model, tokenizer = build(), tiny_tokenizer()
    results = evaluate_model(model, tokenizer, request_of_text)["results"]["text"]
    (prepared,) = prepare_windows(request_of_text, tokenizer, "llama")
    with torch.no_grad():
        losses = [
            model(input_ids=window[None], labels=window[None], use_cache=False).loss.item()
            for window in prepared.windows
        ]
    assert results["per_window"] == pytest.approx(losses, rel=1e-5)
    expected = torch.tensor(losses, dtype=torch.float64).mean().exp().item()
    assert results["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (results["tokens"], results["windows"]) == (4 * 31, 4)


def test_the_dense_figures_stand_beside(request_of_text):
    model, dense, tokenizer = other_model(), tiny_llama(), tiny_tokenizer()
    measured = evaluate_model(model, tokenizer, request_of_text, dense)
    alone = evaluate_model(dense, tokenizer, request_of_text)
    assert measured["dense"]["text"]["per_window"] == pytest.approx(
        alone["results"]["text"]["per_window"], rel=1e-6
    )
    results = measured["results"]["text"]
    assert results["kl"] > 0 and 0 < results["top1"] <= 1
    for name, mean in (("per_window", "nll_per_token"), ("per_window_kl", "kl")):
        assert results[mean] == pytest.approx(sum(results[name]) / 4)
    assert alone["dense"] is None and "kl" not in alone["results"]["text"]


def test_dense_results_are_taken_over_without_the_dense_model(request_of_text):
    measured = evaluate_model(
        other_model(),
        tiny_tokenizer(),
        request_of_text,
        dense_results={"text": {"perplexity": 9.0}},
    )
    assert measured["dense"] == {"text": {"perplexity": 9.0}}


@pytest.fixture
def scored(monkeypatch):
    """A stand-in for the harness that notes which models it scored."""
    models = []

    def zero_shot(model, names, **settings):
        models.append(model)
        scores = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": None, "acc_norm_stderr": None}
        return {name: ({"version": 1}, scores | {"per_question": [0, 1]}) for name in names}

    monkeypatch.setattr(module, "zero_shot", zero_shot)
    monkeypatch.setattr(module, "check_tasks", lambda names, data: None)
    return models


def test_tasks_run_on_both_models_and_not_again_where_the_dense_ones_are_known(
    request_of_text, scored
):
    both = dataclasses.replace(request_of_text, zero_shot="piqa,boolq")
    model, dense, tokenizer = other_model(), tiny_llama(), tiny_tokenizer()
    first = evaluate_model(model, tokenizer, both, dense)
    assert scored == [model, dense] * 2
    second = evaluate_model(model, tokenizer, both, dense, first["dense"])
    assert scored == [model, dense] * 2 + [model] * 2
    assert second["dense"].keys() == first["dense"].keys() == {"text", "piqa", "boolq"}


def test_what_is_measured_is_handed_out_after_every_protocol_and_task(request_of_text, scored):
    both = dataclasses.replace(request_of_text, zero_shot="piqa,boolq")
    kept = []
    evaluate_model(
        other_model(),
        tiny_tokenizer(),
        both,
        tiny_llama(),
        keep=lambda measured: kept.append((list(measured["results"]), list(measured["dense"]))),
    )
    assert kept == [
        (names, names) for names in (["text"], ["text", "piqa"], ["text", "piqa", "boolq"])
    ]
    assert phase_names(both, True) == ["text", "piqa", "dense piqa", "boolq", "dense boolq"]
    assert phase_names(both, False) == ["text", "piqa", "boolq"]


def test_a_record_holds_the_contract_and_its_table_every_figure(request_of_text, scored):
    both = dataclasses.replace(request_of_text, zero_shot="piqa")
    model, tokenizer = other_model(), tiny_tokenizer()
    measured = evaluate_model(model, tokenizer, both, tiny_llama())
    settings = {"name": "OUT", "method": "int8", "file_bytes": 12, "seed": None, "seconds": {}}
    record = make_record(measured, model, tokenizer, **settings, dense_name="MODEL")
    assert set(
        "format model method protocols results dense bits file_bytes seed versions seconds".split()
    ) <= set(record)
    assert record["protocols"].keys() == record["results"].keys() == record["dense"].keys()
    assert {"version", "length", "bos_each_window", "seed"} <= record["protocols"]["text"].keys()
    assert record["zero_shot_mean"]["dense"]["acc"] == 0.5
    assert len({"body_bits_per_weight", "bytes_on_disk"} & record["bits"].keys()) == 2
    text = result_table(record)
    results = record["results"]["text"]
    for shown in (results["perplexity"], record["dense"]["text"]["perplexity"], results["kl"]):
        assert f"{shown:.4f}" in text
    assert "piqa, acc" in text and "0.5000 +- 0.1000" in text and "acc_norm" not in text


def test_windows_longer_than_the_model_are_refused_before_any_is_measured(
    request_of_text, monkeypatch
):
    monkeypatch.setattr(module, "perplexity", None)
    long = dataclasses.replace(request_of_text, windows=1, length=200)
    with pytest.raises(ValueError, match="windows of 200 tokens are longer than the model's 128"):
        evaluate_model(tiny_llama(), tiny_tokenizer(), long)


BAD = {
    "protocol": ({"protocol": "wikitext-2"}, "no protocol 'wikitext-2'; near: wikitext2"),
    "task": ({"zero_shot": "arc_esy"}, "no task 'arc_esy'; near: arc_easy"),
    "task far from all": ({"zero_shot": "xyz"}, "no task 'xyz'; all: boolq, piqa"),
    "no name": ({"zero_shot": " , "}, "at least one task"),
    "no text": ({"protocol": "text"}, "give --text FILE"),
    "text of no protocol": ({"protocol": "c4", "text": "a.txt"}, "c4 does not use --text a.txt"),
    "one question": ({"zero_shot": "piqa", "questions": 1}, "needs 2 or more"),
    "questions of no task": ({"text": "a.txt", "questions": 5}, "--questions is about --zero-shot"),
    "no batch": ({"zero_shot": "piqa", "batch": 0}, "batch is 0"),
    "BOS": ({"bos_each_window": "yes"}, "must be auto, true, false, got 'yes'"),
    "windows": ({"text": "a.txt", "windows": 0}, "number of windows is 0"),
    "softmax": ({"softmax_dtype": "int8"}, "null or float32, got 'int8'"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        EvaluationRequest(**fields)


def test_names_may_repeat_and_all_means_every_task():
    request = EvaluationRequest(protocol="c4, wikitext2,c4", zero_shot="all")
    assert request.protocols == ["c4", "wikitext2"]
    assert len(request.tasks) == 6 and not request.empty
    assert EvaluationRequest(text="a.txt").protocols == ["text"]
    assert EvaluationRequest().empty
