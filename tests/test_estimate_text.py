"""Text that the model writes itself is known beforehand: its memory and time, and what a promise asks to change."""

import dataclasses
import json

import pytest
import torch
from command_line import call
from test_embedding_memory import allocated
from tiny_models import FAMILIES, VOCAB, random_windows, tiny_llama

from nanoquant.advice.anatomy import anatomy
from nanoquant.advice.config import Use as Reading
from nanoquant.advice.memory import cache_bytes
from nanoquant.config import nanoquant_config
from nanoquant.estimate import work
from nanoquant.estimate.limits import CHANGES, Plan, fit
from nanoquant.estimate.machine import FASTEST
from nanoquant.estimate.memory import HEAP
from nanoquant.estimate.request import EstimateConfig
from nanoquant.estimate.subject import skeleton_in, subject_of
from nanoquant.estimate.terms import Use
from nanoquant.self_text import PHASE, SelfText

pytestmark = pytest.mark.usefixtures("untouched_process")

USE = Use(0, text="text.txt")


def settings(windows=64, batch=8, length=100, **changes):
    own = {"windows": windows, "batch": batch}
    return nanoquant_config(
        2.0,
        budget={"rank_multiple": 8},
        calibration={"length": length},
        self_text=own,
        **changes,
    )


def subject(config, family="llama", dtype=torch.bfloat16, mapped=True):
    model = skeleton_in(FAMILIES[family](dtype=dtype).config, dtype)
    return subject_of(family, model, config, 10**6, mapped)


def terms(config, use=USE, **of):
    """Those of the phase by name, without those of every phase; None where it does not run."""
    needs = {need.phase: need for need in Plan(subject(config, **of), config, use).needs()}
    if PHASE not in needs:
        return None
    return {t.name: t for t in needs[PHASE].terms if not t.host and t.bytes not in (0, HEAP)}


def test_the_phase_is_there_where_the_model_writes_and_grows_up_to_a_batch_of_windows():
    assert terms(settings(0)) is None
    few, batch, many, double = (
        sum(t.bytes for t in terms(settings(*asked)).values())
        for asked in ((4,), (8,), (1000,), (1000, 16))
    )
    assert few < batch == many < double


@pytest.mark.parametrize("text", ["self", ["text.txt=3", "self=1"]])
def test_a_text_that_is_the_model_s_own_is_written_in_whole(text):
    config = settings(0, model={"windows": 3, "held_out": 1}, block={"windows": 2})
    config = dataclasses.replace(
        config, calibration=dataclasses.replace(config.calibration, windows=4)
    )
    own = terms(config, dataclasses.replace(USE, text=text))
    cached = subject(config).cached
    assert own["keys and values"].bytes == 2 * 5 * 101 * sum(block.numbers for block in cached)
    for other in ((), "./self", ["self.txt", "myself=2"]):
        assert terms(config, dataclasses.replace(USE, text=other)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_writing_allocates_is_below_its_terms_which_are_near(family, dtype):
    config = settings(8)
    write = SelfText(FAMILIES[family](dtype=dtype), None, config.self_text)
    pool = random_windows(8, config.self_text.prompt)
    found = terms(config, family=family, dtype=dtype)
    weights = found.pop("the dense model").bytes
    assert weights == subject(config, family, dtype).dense_bytes
    most = allocated(lambda: write(8, 99, pool))
    assert most < sum(t.bytes for t in found.values()) < 2 * most
    assert {t.change for t in found.values()} == {"--self_text.batch"}


def test_logits_of_a_large_vocabulary_are_those_of_two_steps():
    config = settings(8, length=40)
    model = tiny_llama(dtype=torch.bfloat16, vocab_size=256 * VOCAB)
    write = SelfText(model, None, config.self_text)
    asked = subject_of("large", skeleton_in(model.config, model.dtype), config, 10**6, mapped=True)
    own = work.sampled(asked, 8)
    most = allocated(lambda: write(8, 39, random_windows(8, 32)))
    assert 0.8 * own < most < own + sum(t.bytes for t in terms(config).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_those_that_the_advisor_counts(family):
    of = subject(settings(), family)
    reading = Reading(100, 8, "cpu", 16)
    assert work.cache(of, 8, 100) == cache_bytes(anatomy(of.model.config), reading)


def test_no_mapped_block_is_let_go_of_but_where_blocks_visit_a_gpu():
    config = settings()
    whole, of = "the dense model", subject(config)
    assert terms(config)[whole].bytes == of.dense_bytes
    assert terms(config, Use(0, gpu=True))[whole].bytes == of.dense_bytes
    visiting = terms(CHANGES["--run.offload"](config), Use(0, gpu=True))
    assert whole not in visiting
    assert visiting["dense weights of a block, embedding and head"].bytes < of.dense_bytes


def test_a_promise_that_only_writing_breaks_is_refused_with_the_batch_that_keeps_it():
    config = settings(4096, 4096)
    of, use = subject(config), dataclasses.replace(USE, base=10**6)
    small = CHANGES["--self_text.batch 1"](config)
    least, other = (Plan(of, c, use).least(False) for c in (config, small))
    assert other < least
    with pytest.raises(ValueError, match="the phase 'write text' takes") as caught:
        fit(of, config, use, f"{least - 1}B", None)
    assert "with --self_text.batch 1" in str(caught.value)
    fit(of, small, use, f"{other}B", None)


def estimated(capsys, tmp_path, *flags):
    """Seconds of the phase at least, and its memory."""
    file = tmp_path / "estimate.json"
    command = ["estimate", "demo", "--machine", "h100", "--json", file, *flags]
    code, _, err = call(capsys, *command)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert (PHASE in found["seconds"]) == (PHASE in found["memory"])
    return found["seconds"].get(PHASE, [0])[0], found["memory"].get(PHASE)


def test_the_command_counts_what_the_model_writes(tmp_path, capsys):
    assert estimated(capsys, tmp_path, "--text", "train.txt") == (0, None)
    flags = ["--self_text.windows", 64, "--self_text.batch"]
    one, two = (estimated(capsys, tmp_path, *flags, n)[0] for n in (64, 32))
    assert 1.5 * one < two < 2 * one  # twice as many steps, and the same products
    mixed = ["--text", "train.txt=3", "--text", "self=1"]
    whole = estimated(capsys, tmp_path, "--text", "self")[0]
    assert estimated(capsys, tmp_path, *mixed)[0] == whole > one
    away = estimated(capsys, tmp_path, *flags, 64, "--run.offload")[0]
    moved = 2 * (134_515_008 - 49152 * 576 - 576)  # all but embedding and last norm, in bfloat16
    steps = nanoquant_config().calibration.length
    assert away - one == pytest.approx(FASTEST * steps * moved / 25e9)
    assert EstimateConfig(source="demo").text is None
