"""Memory is known beforehand: phases against their estimates, and promises that are kept or refused."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from command_line import SMALL, WORDS, call, refused
from tiny_models import random_windows, tiny_llama, tiny_tokenizer

from nanoquant.config import nanoquant_config
from nanoquant.estimate.limits import CHANGES, Plan, fit
from nanoquant.estimate.subject import subject_of
from nanoquant.estimate.terms import ACTIVATIONS, Use
from nanoquant.importance_store import ImportanceStore, as_tensors
from nanoquant.quantize import quantize
from nanoquant.training import RunConfig

pytestmark = pytest.mark.usefixtures("untouched_process")

BASE = 500 * 10**6
CONFIG = nanoquant_config(
    2.0, budget={"rank_multiple": 8}, calibration={"windows": 1 << 17, "length": 64}
)


def tiny_subject(config=CONFIG):
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_llama(dtype=torch.bfloat16, layers=3).config)
    return subject_of("tiny", model.to(torch.bfloat16), config, 10**6, mapped=True)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_promise_is_kept_by_activations_on_the_disk_and_refused_below_that(gpu):
    subject, use = tiny_subject(), Use(BASE, gpu, 64)
    plan = Plan(subject, CONFIG, use)
    least, most = plan.least(gpu), max(need.bytes(gpu) for need in plan.needs())
    assert least < most

    def limits(size):
        return (None, f"{size}B") if gpu else (f"{size}B", None)

    assert fit(subject, CONFIG, use, *limits(most)) == CONFIG
    changed = fit(subject, CONFIG, use, *limits(least))
    assert changed.run.activation_memory is not None
    assert dataclasses.replace(changed, run=CONFIG.run) == CONFIG
    assert max(need.bytes(gpu) for need in Plan(subject, changed, use).needs()) <= least + 1
    with pytest.raises(ValueError, match="can't be kept"):
        fit(subject, CONFIG, use, *limits(least - 1))


def test_a_refusal_names_phase_term_smallest_memory_and_settings_that_are_true():
    config = nanoquant_config(2.0, budget={"rank_multiple": 8})
    subject, use = tiny_subject(config), Use(10**6, False, None)
    plan = Plan(subject, config, use)
    with pytest.raises(ValueError) as caught:
        fit(subject, config, use, f"{plan.least(False) // 2}B", None)
    text = str(caught.value)
    worst = max(plan.needs(), key=lambda need: need.bytes())
    assert f"the phase {worst.phase!r}" in text or "the phase 'load'" in text
    flag = next(flag for flag in CHANGES if f"with {flag}" in text)
    smaller = CHANGES[flag](config)
    least = Plan(subject, smaller, use).least(False)
    assert least < plan.least(False)
    fit(subject, smaller, use, f"{least}B", None)


def test_a_refusal_names_no_setting_that_the_run_would_refuse():
    config = nanoquant_config(
        2.0,
        budget={"rank_multiple": 8},
        model={"train": "none"},
        importance={"curvature": "inputs", "temper": 0.25},
    )
    with pytest.raises(ValueError, match="--max-memory 1.0 kB can't be kept") as caught:
        fit(tiny_subject(config), config, Use(10**6, False, None), "1kB", None)
    assert "--model.recompute" not in str(caught.value)
    assert "--importance.curvature" not in str(caught.value)


@pytest.mark.parametrize("memory", [None, "1kB"])
def test_a_promise_for_a_gpu_is_refused_where_the_run_has_none(memory):
    with pytest.raises(ValueError, match="--max-gpu-memory 16GB and a run on the CPU exclude"):
        fit(tiny_subject(), CONFIG, Use(BASE, False, None), memory, "16GB")


def test_on_a_gpu_the_model_is_there_and_the_process_in_main_memory():
    plan = Plan(tiny_subject(), CONFIG, Use(BASE, True, 64))
    for need in plan.needs():
        assert need.bytes() >= BASE and need.bytes(device=True) > 0
        assert sum(term.bytes for term in need.terms) == need.bytes() + need.bytes(device=True)
    plain = Plan(tiny_subject(), CONFIG, Use(BASE, False, 64))
    assert all(need.bytes(device=True) == 0 for need in plain.needs())


def test_blocks_that_visit_a_gpu_count_there_one_at_a_time():
    subject, use = tiny_subject(), Use(BASE, True, None)
    stays, visits = (
        {need.phase: need.bytes(device=True) for need in Plan(subject, config, use).needs()}
        for config in (CONFIG, CHANGES["--run.offload"](CONFIG))
    )
    one = subject.dense_bytes // 4  # three blocks, embedding and head
    for phase in ("calibrate", "blocks", "model"):
        assert stays[phase] - visits[phase] > one, phase
    assert max(visits.values()) < max(stays.values())


def test_statistics_of_all_blocks_are_counted_where_no_file_keeps_them(monkeypatch):
    config = nanoquant_config(
        2.0,
        calibration={"windows": 4, "length": 16},
        sensitivity={"iterations": 2, "length": 8},
        importance={"curvature": "both"},
        admm={"iterations": 2},
        model={"train": "none"},
        run={"save_every": None},
    )
    held, release = [], ImportanceStore.release

    def look(store):
        tensors = {id(t): t for b in range(3) for t in as_tensors(store(b))[0].values()}
        held.append(sum(t.nbytes for t in tensors.values()))
        release(store)

    monkeypatch.setattr(ImportanceStore, "release", look)
    quantize(tiny_llama(layers=3), random_windows(8, 16).flatten(), config)
    kept = dataclasses.replace(config, run=RunConfig())
    for phase in ("calibrate", "ranks", "blocks"):
        all_of, one = (
            next(
                term.bytes
                for need in Plan(tiny_subject(c), c, Use(BASE)).needs()
                for term in need.terms
                if need.phase == phase and term.name.startswith("statistics of")
            )
            for c in (config, kept)
        )
        assert held == [all_of] and all_of == 3 * one


@pytest.mark.parametrize("length", [None, 64])
@pytest.mark.parametrize("verify", [True, False])
def test_the_process_that_verifies_is_counted_without_held_out_text_too(verify, length):
    needs = {
        need.phase: need
        for need in Plan(tiny_subject(), CONFIG, Use(BASE, False, length, verify)).needs()
    }
    assert ("measure dense" in needs) == (length is not None)
    assert ("measure in a fresh process" in needs) == (verify or length is not None)
    if verify:
        assert needs["measure in a fresh process"].bytes() > 2 * BASE


def test_processes_that_divide_what_trains_hold_a_part_each_and_a_block():
    alone, shard, batch = (
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))
        for changes in ({"batch": 1}, {"batch": 1, "shard": True}, {"batch": 4})
    )

    def terms(config, devices, gpu=False):
        plan = Plan(tiny_subject(), config, Use(BASE, gpu, None, devices=devices))
        (need,) = (need for need in plan.needs() if need.phase == "model")
        return {term.name: term.bytes for term in need.terms}

    one, four = terms(alone, 1), terms(shard, 4)
    assert terms(alone, 4) == terms(shard, 1) == terms(batch, 4) == one
    divided = ("what trains", "gradients", "moments", "the best state")
    for name, size in one.items():
        part = 4 if name.startswith(divided) else 1
        assert four.pop(name) == pytest.approx(size / part, rel=1e-4), name
    assert set(four) == {
        "a block, gathered, and its gradient",
        "latents, whole until they are divided",
    }
    assert four["latents, whole until they are divided"] == 0  # they stay in files
    whole = terms(shard, 64, gpu=True)["latents, whole until they are divided"]
    assert 0.8 < whole / (one["what trains, in float32"]) < 1  # what else trains is small


def test_settings_that_make_phases_smaller_do():
    plan = Plan(tiny_subject(), CONFIG, Use(BASE, False, 64))
    before = {need.phase: need.bytes() for need in plan.needs()}
    for flag, phase in {
        "--model.train scales": "model",
        "--model.optimizer.state_bits 8": "model",
        "--model.recompute": "model",
        "--calibration.batch 1": "calibrate",
        "--importance.curvature diagonal": "blocks",
    }.items():
        changed = Plan(plan.subject, CHANGES[flag](CONFIG), plan.use)
        after = {need.phase: need.bytes() for need in changed.needs()}
        assert after[phase] < before[phase], flag


def test_quantize_refuses_a_promise_before_it_loads_anything(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nanoquant.job.load_model", None)
    command = ["quantize", place / "dense", tmp_path / "new", "--text", place / "text.txt", *SMALL]
    line = refused(capsys, *command, "--max-memory", "1MB")
    assert "--max-memory 1.0 MB can't be kept: the phase 'load' takes" in line
    assert "for the process with its libraries; the smallest that would do is" in line
    if not torch.cuda.is_available():
        line = refused(capsys, *command, "--max-gpu-memory", "16GB")
        assert "--max-gpu-memory 16GB and a run on the CPU exclude each other" in line
    assert "max_memory must be a number above 0" in refused(capsys, *command, "--max-memory", "16")
    assert "run.offload and a run on the CPU exclude" in refused(capsys, *command, "--run.offload")
    assert not (tmp_path / "new").exists()


def test_the_plan_is_what_quantize_runs_and_the_question_is_on_record(
    place, tmp_path, capsys, monkeypatch
):
    given = {}

    def stop(model, plan, config, *rest, **more):
        given["config"] = config
        raise KeyboardInterrupt

    run = RunConfig(activation_memory="1kB")
    monkeypatch.setattr("nanoquant.job.quantize", stop)
    monkeypatch.setattr(
        "nanoquant.job.fit", lambda subject, config, *rest: dataclasses.replace(config, run=run)
    )
    command = ["quantize", place / "dense", tmp_path / "new", "--text", place / "text.txt", *SMALL]
    assert call(capsys, *command, "--max-memory", "1000GB")[0] == 130
    assert given["config"].run == run
    record = json.loads((tmp_path / "new.run" / "run.json").read_text())
    assert record["config"]["run"]["activation_memory"] is None


PHASES = ("calibrate", "ranks", "blocks", "model")
BINARY = ["--admm.iterations", 2, "--sensitivity.iterations", 2]
LITTLE = ["--model.recompute", "--model.kept_logits", 8, "--run.activation_memory", "1MB"]
RUNS = {
    "signs": BINARY,
    "scales, tuned blocks": [*BINARY, "--model.train", "scales", "--block.dense_epochs", 1],
    "in little": [*BINARY, *LITTLE],
    "own text": [
        *BINARY,
        "--self_text.windows",
        8,
        "--self_text.batch",
        4,
        "--self_text.prompt",
        8,
    ],
    "rounded embedding": [*BINARY, "--embedding.bits", 8],
    "codebooks": ["--method", "product", "--bits", 2],
    "codebooks, tuned blocks": ["--method", "product", "--block.refine_epochs", 1],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_phases_stay_below_their_estimates_which_are_near(kind, tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 4096}
    tiny_llama(layers=3, dtype=torch.bfloat16, **wide).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(WORDS * 400)
    flags = "--calibration.windows 16 --calibration.length 64".split()
    flags += ["--model.windows", 8, "--model.held_out", 2, "--block.windows", 4, *RUNS[kind]]
    once = ["--eval-windows", 2, "--eval-length", 64]
    text = tmp_path / "text.txt"
    for command in (
        ["estimate", "dense", *flags, *once, "--json", "estimate.json"],
        ["quantize", "dense", "out", "--text", text, "--eval-text", text, *flags, *once],
    ):
        words = [sys.executable, "-m", "nanoquant", *map(str, command)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out.run" / "run.json").read_text())["memory_bytes"]
    estimate = json.loads((tmp_path / "estimate.json").read_text())["memory"]
    base = next(t["bytes"] for t in estimate["load"]["terms"] if "process" in t["name"])
    for phase, bytes in measured.items():
        expected = estimate[phase]["memory_bytes"]
        assert bytes < expected, (phase, bytes, expected)
        assert phase not in PHASES or expected < 2 * bytes + base, (phase, bytes, expected)
    assert ACTIVATIONS in {term["change"] for term in estimate["calibrate"]["terms"]}
