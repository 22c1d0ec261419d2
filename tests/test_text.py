"""Windows of the calibration text: whose they are, that all differ, and what can't be had."""

import dataclasses

import pytest
import torch
from tiny_models import tiny_tokenizer

from nanoquant.block_config import BlockConfig
from nanoquant.config import CalibrationConfig, NanoQuantConfig
from nanoquant.mixture import Source
from nanoquant.model_config import ModelConfig
from nanoquant.self_text import SelfTextConfig
from nanoquant.text import split_text
from nanoquant.text_plan import plan_text
from nanoquant.training import RunConfig

SMALL = NanoQuantConfig(
    calibration=CalibrationConfig(windows=4, length=10),
    block=BlockConfig(windows=6, dense_epochs=1),
    model=ModelConfig(windows=20, held_out=5),
    run=RunConfig(accelerator="cpu", seed=3),
)


def source(name, windows, start, weight=None):
    """A text of which every token is different."""
    return Source(name, torch.arange(start, start + windows * 10), weight)


def changed(**parts):
    """SMALL with fields of its stages changed: changed(model={"windows": 3})."""
    stages = {name: dataclasses.replace(getattr(SMALL, name), **new) for name, new in parts.items()}
    return dataclasses.replace(SMALL, **stages)


def counts(windows, *starts):
    """How many of the windows come from texts that begin with these tokens."""
    return [int((windows[:, 0] // 1000 == start // 1000).sum()) for start in starts]


def test_each_source_gives_its_share_in_every_use_and_all_windows_differ():
    sources = [source("a", 50, 0, 3.0), source("b", 8, 1000, 1.0)]
    text = split_text(sources, None, SMALL)
    assert counts(text.training, 0, 1000) == [15, 5]
    assert counts(text.held_out, 0, 1000) == [4, 1]
    assert counts(text.calibration[:4], 0, 1000) == [3, 1] and len(text.calibration) == 6
    assert torch.cat([text.training, text.held_out]).unique().numel() == 250
    assert text.held_out.tolist()[-1] == list(range(1070, 1080))


def test_without_weights_shares_follow_the_size_and_everything_can_be_used_up():
    sources = [source("a", 13, 0), source("b", 7, 1000), source("c", 5, 2000)]
    text = split_text(sources, None, SMALL)
    both = torch.cat([text.training, text.held_out])
    assert counts(both, 0, 1000, 2000) == [13, 7, 5] and both.unique().numel() == 250


def test_the_same_seed_gives_the_same_windows_and_another_one_does_not():
    sources = [source("a", 50, 0, 3.0), source("b", 50, 1000, 1.0)]
    one, same = (split_text(sources, None, SMALL) for _ in range(2))
    other = split_text(sources, None, changed(run={"seed": 4}))
    assert torch.equal(one.training, same.training) and torch.equal(one.held_out, same.held_out)
    assert not torch.equal(one.training, other.training)


def test_the_report_says_which_windows_came_from_where():
    sources = [source("a", 50, 0, 3.0), source("b", 8, 1000, 1.0)]
    text = split_text(sources, None, SMALL)
    a, b = text.origin
    assert (a["source"], a["weight"], a["tokens"]) == ("a", 3.0, 500)
    assert a["counts"] == {"calibration": 5, "training": 15, "held_out": 4}
    assert (b["windows"]["held_out"], a["windows"]["held_out"]) == ("7", "46-49")
    named = [
        number
        for part in b["windows"]["training"].split()
        for number in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assert [1000 + 10 * number for number in named] == sorted(
        first for first in text.training[:, 0].tolist() if first >= 1000
    )


def written(asked):
    """A writer that notes what it is asked for and gives windows of one token each."""

    def write(count, length, pool):
        asked.append((count, length, pool))
        return torch.arange(5000, 5000 + count)[:, None].expand(count, length)

    return write


def test_text_self_is_written_and_held_out_windows_are_others():
    asked = []
    text = split_text("self", None, SMALL, written(asked))
    assert asked == [(25, 10, None)] and plan_text("self", None, SMALL).written == 25
    assert text.training[:, 0].tolist() == list(range(5000, 5020))
    assert text.held_out[:, 0].tolist() == list(range(5020, 5025))
    assert text.origin[0]["tokens"] is None and [*text.origin[0]["counts"].values()] == [6, 20, 5]


def test_the_model_may_write_a_share_of_a_mixture():
    sources = [source("a", 50, 0, 4.0), Source("self", None, 1.0)]
    text = split_text(sources, None, SMALL, written([]))
    assert counts(text.training, 0, 5000) == [16, 4] and counts(text.held_out, 0, 5000) == [4, 1]


def test_added_windows_go_on_from_beginnings_of_windows_that_are_not_held_out():
    asked = []
    config = changed(self_text={"windows": 7, "prompt": 3})
    text = split_text([source("a", 30, 0)], None, config, written(asked))
    count, length, pool = asked[0]
    assert (count, length, pool.shape) == (7, 10, (25 * 3, 3))
    assert text.training.shape == (27, 10) and len(text.calibration) == 6
    assert (pool[:25, 0] % 10 == 0).all() and (pool[25:50, 0] % 10 == 3).all()
    assert not set(pool.flatten().tolist()) & set(text.held_out.flatten().tolist())
    assert not set(pool[:5].flatten().tolist()) & set(
        text.training.flatten().tolist()
    )  # unused first
    assert [*text.origin[-1]["counts"].values()] == [0, 7, 0] and plan_text(
        data(30), None, config
    ).written == 7


def data(windows):
    return [source("a", windows, 0)]


def test_bos_is_in_front_of_written_windows_too():
    tokenizer, asked = tiny_tokenizer(add_bos=True), []
    text = split_text("self", tokenizer, SMALL, written(asked))
    assert asked == [(25, 9, None)] and text.training.shape == (20, 10)
    assert (text.training[:, 0] == 1).all() and (text.held_out[:, 0] == 1).all()


def test_a_plan_is_made_anew_for_another_configuration():
    plan = plan_text(data(50), None, SMALL)
    text = split_text(plan, None, changed(model={"windows": 30, "held_out": 7}))
    assert len(text.training) == 30 and len(text.held_out) == 7


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (
            data(24),
            SMALL,
            "240 tokens, enough for 24 windows of 10; needed are 250: 20 windows for model.windows=20",
        ),
        (
            data(24),
            SMALL,
            "or let the model write the rest: model.windows=19 and self_text.windows=1",
        ),
        (
            data(9),
            changed(calibration={"windows": 30}),
            "30 windows for calibration.windows=30 and block.windows=6",
        ),
        (
            data(9),
            SMALL,
            'for block.windows=6 and model.windows=20.*let the model write all: text "self"',
        ),
        (
            data(24),
            changed(self_text={"windows": 4, "prompt": 3}),
            "model.windows=19 and self_text.windows=5",
        ),
        (
            [source("a", 90, 0, 1.0), source("b", 9, 1000, 3.0)],
            SMALL,
            "b has 9 windows of 10 tokens, but its weight 3 of 4 asks for 19 of 25 windows; .* lower model.windows=20",
        ),
        (
            [source("a", 90, 0, 1000.0), source("b", 9, 1000, 1.0)],
            SMALL,
            "the share of b in 20 windows is none",
        ),
        (
            [source("a", 90, 0), Source("b", torch.arange(9))],
            SMALL,
            "b has not one window of 10 tokens; give it more text",
        ),
        (
            data(30),
            changed(self_text={"windows": 4, "prompt": 10}),
            "prompt=10 leaves nothing to write in windows of 10 tokens; allowed: up to 9",
        ),
        (
            "self",
            changed(self_text={"windows": 4}),
            'text "self" has none; ask for more model.windows',
        ),
        (
            data(30),
            changed(self_text={"windows": 4, "prompt": 3}, model={"train": "none"}),
            "model.train=none leaves it out",
        ),
        (data(30), changed(self_text={"temperature": 0.8}), "temperature=0.8 changes nothing: the"),
        ("self", changed(self_text={"prompt": 3}), "prompt=3 changes nothing: windows of text"),
        (data(30), changed(self_text={"windows": 1, "prompt": 3, "first": 9}), "first=9 changes"),
    ],
)
def test_windows_that_cannot_be_had_are_refused(data, config, message):
    with pytest.raises(ValueError, match=message):
        plan_text(data, None, config)


@pytest.mark.parametrize(
    "bad", [{"windows": -1}, {"prompt": 0}, {"first": 0}, {"batch": 0}, {"temperature": 0.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        SelfTextConfig(**bad)
