"""Paired differences against intervals computed by hand, and what can't be compared."""

import json
import math

import pytest

from nanoquant.evaluation.compare import (
    compare,
    compare_table,
    paired_interval,
    read_record,
    t_quantile,
)

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
"""Two-sided 95% quantiles of Student's t, from printed tables."""


def record(nll=(3.0, 2.0, 4.0), acc=None, **changes):
    """A record with one text and perhaps one task."""
    settings = {"version": 1, "tokens_sha256": "aa", "length": 512, "source": "text.txt"}
    made = {
        "format": 1,
        "tokenizer": {"class": "Fast", "tokens": 100, "sha256": "t1"},
        "protocols": {"text": settings},
        "results": {"text": {"per_window": list(nll)}},
    }
    for name, answers in (acc or {}).items():
        made["protocols"][name] = {"version": 1.0, "questions_sha256": "qq"}
        made["results"][name] = {"per_question": list(answers)}
    return made | changes


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_printed_tables(degrees):
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=6e-4)


def test_quantiles_approach_the_normal_one():
    assert t_quantile(10_041) == pytest.approx(1.95996, abs=3e-4)


def test_the_interval_is_the_one_computed_by_hand():
    # differences 0.5, 1.0, 0.6: mean 0.7, squares 0.04 + 0.09 + 0.01 = 0.14, variance 0.07,
    # standard error sqrt(0.07 / 3) = 0.152753, t(2) = 4.302653, half width 0.657242
    mean, half, error = paired_interval([3.0, 2.0, 4.0], [3.5, 3.0, 4.6])
    assert (mean, error, half) == pytest.approx((0.7, 0.1527525, 0.6572421), rel=1e-5)


def test_differences_of_a_comparison_are_paired_and_have_a_ratio_of_perplexities():
    found = compare(["a", "b"], [record(), record(nll=(3.5, 3.0, 4.6))])
    (entry,) = found["differences"]
    assert (entry["model"], entry["protocol"], entry["pairs"]) == ("b", "text", 3)
    ends = (entry["mean"], entry["low"], entry["high"])
    assert ends == pytest.approx((0.7, 0.0427579, 1.3572421), rel=1e-4)
    assert entry["ratio"] == pytest.approx(math.exp(0.7))
    text = compare_table(found)
    assert "+0.7000  +0.0428 to +1.3572 *" in text and "2.0138" in text


def test_a_shift_shared_by_all_windows_does_not_widen_the_interval():
    first = record(nll=[1.0, 5.0, 3.0, 9.0])
    second = record(nll=[1.1, 5.1, 3.1, 9.1])
    (entry,) = compare(["a", "b"], [first, second])["differences"]
    assert entry["high"] - entry["low"] < 1e-9 and entry["mean"] == pytest.approx(0.1)


def test_questions_are_paired_and_tasks_are_averaged():
    first = record(acc={"piqa": [1, 0, 1, 1], "boolq": [0, 0, 1, 1]})
    second = record(acc={"piqa": [1, 1, 1, 0], "boolq": [1, 0, 1, 1]})
    _, piqa, boolq, mean = compare(["a", "b"], [first, second])["differences"]
    assert (piqa["mean"], boolq["mean"], mean["mean"]) == (0.0, 0.25, 0.125)
    # variances 2/3 and 1/4 of the differences, over 4 questions each
    errors = math.sqrt(2 / 3 / 4), 0.25
    assert (piqa["stderr"], boolq["stderr"]) == pytest.approx(errors)
    assert mean["stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert (mean["protocol"], mean["pairs"]) == ("mean of 2 tasks", 8)
    # Welch and Satterthwaite: (1/6 + 1/16)^2 / ((1/6)^2 / 3 + (1/16)^2 / 3) = 4.97, taken as 4
    assert mean["high"] - mean["mean"] == pytest.approx(2.776 * mean["stderr"], rel=1e-3)


def test_every_other_record_is_compared_with_the_first():
    found = compare(["a", "b", "c"], [record(), record(), record(nll=(4, 3, 5))])
    assert [entry["model"] for entry in found["differences"]] == ["b", "c"]
    assert [entry["mean"] for entry in found["differences"]] == [0, 1]


def test_what_only_one_record_has_is_said():
    found = compare(["a", "b"], [record(acc={"piqa": [1, 0]}), record()])
    assert found["left_out"] == ["b has no piqa"]


def test_mismatched_tokenizers_are_refused_by_name():
    other = record(tokenizer={"class": "Slow", "tokens": 32000, "sha256": "t2"})
    message = r"one.json and two.json have other tokenizers \(Fast of 100 tokens, Slow of 32,000\), so text"
    with pytest.raises(ValueError, match=message):
        compare(["one.json", "two.json"], [record(), other])


def test_answers_may_be_compared_across_tokenizers():
    first, second = record(acc={"piqa": [1, 0]}), record(acc={"piqa": [1, 1]})
    for one in (first, second):
        del one["protocols"]["text"], one["results"]["text"]
    second["tokenizer"] = {"class": "Slow", "tokens": 5, "sha256": "t2"}
    assert compare(["a", "b"], [first, second])["differences"][0]["mean"] == 0.5


def test_other_settings_of_a_protocol_are_refused_by_name():
    other = record()
    other["protocols"] = {"text": other["protocols"]["text"] | {"length": 2048}}
    with pytest.raises(ValueError, match="measured by another text: length 512 and 2048"):
        compare(["a", "b"], [record(), other])
    other["protocols"]["text"]["source"] = "other.txt"
    with pytest.raises(ValueError, match=r"another text \(text.txt and other.txt\): length 512"):
        compare(["a", "b"], [record(), other])


def test_the_same_text_may_lie_elsewhere():
    other = record()
    other["protocols"]["text"]["source"] = "elsewhere.txt"
    assert compare(["a", "b"], [record(), other])["differences"]


def test_nothing_in_common_is_refused():
    other = record(acc={"piqa": [1, 0]})
    del other["protocols"]["text"], other["results"]["text"]
    with pytest.raises(ValueError, match="no protocol in common: text and piqa"):
        compare(["a", "b"], [record(), other])


def test_one_window_is_too_few():
    with pytest.raises(ValueError, match="2 or more, got 1 and 1"):
        compare(["a", "b"], [record(nll=[1.0]), record(nll=[2.0])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as a record"),
        ("[]", "is no record"),
        ('{"perplexity": 3}', "is no record"),
        (json.dumps(record() | {"format": 2}), "has format 2; this version reads 1"),
    ],
)
def test_files_that_are_no_records_are_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_record(str(tmp_path / "a.json"))
