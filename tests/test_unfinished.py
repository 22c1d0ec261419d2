"""A killed run goes on where it was and ends as if nothing had happened; another run is refused by name."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_llama

from nanoquant import model_reconstruction, training
from nanoquant.admm import ADMMConfig
from nanoquant.block_config import BlockConfig
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.embedding import EmbeddingConfig
from nanoquant.model_config import ModelConfig
from nanoquant.optimizer import OptimizerConfig
from nanoquant.progress import Progress
from nanoquant.quantize import quantize
from nanoquant.tensor_file import TORN, TensorFile
from nanoquant.text_plan import plan_text
from nanoquant.training import RunConfig
from nanoquant.unfinished import check_settings, discard

TOKENS = random_windows(24, 16).flatten()
QUICK = nanoquant_config(
    budget={"bits": 1.4, "rank_multiple": 8},
    calibration=CalibrationConfig(windows=4, length=16),
    sensitivity={"iterations": 2, "length": 8},
    admm=ADMMConfig(iterations=2),
    model=ModelConfig(windows=7, epochs=10, batch=2, held_out=2, evaluations=7, latent_lr=0.05),
    run=RunConfig(save_every=0),
)


class Kill(BaseException):
    """Nothing catches it."""


class Killed(Progress):
    """Dies at a step of a phase, and counts what each phase has done, without what was kept."""

    def __init__(self, at=None, phase="model"):
        super().__init__()
        self.at, self.phase_to_die, self.counts, self.current = at, phase, {}, None

    def begin(self, name, total):
        self.current = name
        self.counts[name] = [0, total]

    def advance(self, done, note=""):
        if self.current == self.phase_to_die and self.counts[self.current][0] == self.at:
            raise Kill
        self.counts[self.current][0] += done * (note != "as it was kept")


def run(work, config=QUICK, kill=None, model=None, tokens=TOKENS, phase="model"):
    """Packed tensors, report and counts of a run; it may be killed at a step of a phase."""
    model, progress = model or tiny_llama(), Killed(kill, phase)
    report = quantize(model, tokens, config, progress=progress, work=work)
    return model.state_dict(), report, progress.counts


BEFORE_MODEL = [
    f"unfinished-{part}-{b:03}.safetensors" for part in ("block", "importance") for b in range(2)
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed(work, step, **settings):
    with pytest.raises(Kill):
        run(work, kill=step, **settings)


STEPS = 40


@pytest.mark.parametrize("step", [0, 1, 15, 16, 17, 34])
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(step, tmp_path):
    expected, whole, _ = run(None)
    killed(tmp_path, step)
    found, report, counts = run(tmp_path)
    assert list(counts) == ["model", "pack"]  # nothing before is done again
    left = STEPS - step // 16 * 16  # copies are made at every 16th step
    assert counts["model"] == [left, left]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert report.model == whole.model and len(report.model.losses) == STEPS
    assert report.blocks == whole.blocks and report.ranks == whole.ranks
    assert report.bits == whole.bits and report.config == whole.config


def test_a_run_that_is_killed_twice_goes_on_twice(tmp_path):
    expected, _, _ = run(None)
    killed(tmp_path, 18)
    killed(tmp_path, 17)
    found, _, counts = run(tmp_path)
    assert counts["model"] == [8, 8]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_on(family, tmp_path):
    expected, _, _ = run(None, model=FAMILIES[family]())
    killed(tmp_path, 20, model=FAMILIES[family]())
    found, _, _ = run(tmp_path, model=FAMILIES[family]())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("spoilt", "step"), [(6, 20), (20, 18), (22, 30), (10, 10)])
@pytest.mark.parametrize("look", [False, True])
def test_undone_steps_change_nothing_of_that(spoilt, step, look, tmp_path, monkeypatch):
    evaluations = (
        STEPS if look else 7
    )  # the spoilt step has a look that comes one later, or has none
    config = dataclasses.replace(
        QUICK, model=dataclasses.replace(QUICK.model, evaluations=evaluations)
    )
    divergence, calls = model_reconstruction.logits_divergence, []

    def spoil(*arguments):
        calls.append(0)
        return divergence(*arguments) * (float("nan") if len(calls) - 1 == spoilt else 1)

    monkeypatch.setattr(model_reconstruction, "logits_divergence", spoil)
    monkeypatch.setattr(training, "first_non_finite", lambda *_: "somewhere")
    expected, whole, _ = run(None, config)
    assert whole.model.undone == 1 and len(whole.model.losses) == STEPS - 1
    calls.clear()
    killed(tmp_path, step, config=config)
    calls[:] = [0] * (step // 16 * 16)
    found, report, _ = run(tmp_path, config)
    assert report.model == whole.model
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tie", [True, False])
def test_bfloat16_and_a_quantized_embedding_go_on_too(bits, tie, tmp_path):
    config = dataclasses.replace(QUICK, embedding=EmbeddingConfig(bits=bits))
    models = [tiny_llama(tie=tie, dtype=torch.bfloat16) for _ in range(3)]
    expected, _, _ = run(None, config, model=models[0])
    killed(tmp_path, 20, config=config, model=models[1])
    found, _, _ = run(tmp_path, config, model=models[2])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_narrow_moments_are_not_kept_and_that_is_said(tmp_path, caplog):
    model = dataclasses.replace(QUICK.model, optimizer=OptimizerConfig(state_bits=8))
    with caplog.at_level(logging.WARNING):
        run(tmp_path, dataclasses.replace(QUICK, model=model))
    assert "moments of 8 bits are not kept" in caplog.text
    assert names(tmp_path) == BEFORE_MODEL


def test_an_own_initializer_is_refused_with_work(tmp_path):
    with pytest.raises(ValueError, match="work and an own initializer exclude"):
        quantize(tiny_llama(), TOKENS, QUICK, initializer=lambda *_: None, work=tmp_path)


def test_files_of_another_run_are_counted(tmp_path):
    killed(tmp_path, 2)
    with pytest.raises(ValueError, match="importance-000.*run.seed '0', not '1'.*so do 4 other"):
        run(tmp_path, dataclasses.replace(QUICK, run=RunConfig(save_every=0, seed=1)))


def test_frozen_signs_go_on_too(tmp_path):
    config = dataclasses.replace(
        QUICK,
        block=BlockConfig(schedule="algorithm1", dense_epochs=1, refine_epochs=1, windows=4),
        model=dataclasses.replace(QUICK.model, train="scales"),
    )
    expected, _, _ = run(None, config)
    killed(tmp_path, 20, config=config)
    found, _, _ = run(tmp_path, config)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"config": dataclasses.replace(QUICK, run=RunConfig(save_every=0, seed=1))},
            "run.seed '0', not '1'",
        ),
        (
            {"config": dataclasses.replace(QUICK, admm=ADMMConfig(iterations=3))},
            "admm.iterations '2', not '3'",
        ),
        ({"model": tiny_llama(layers=3)}, "model weights"),
        ({"tokens": TOKENS.flip(0)}, "text"),
    ],
    ids=["seed", "iterations", "model", "text"],
)
def test_unfinished_work_of_another_run_is_refused_with_the_difference(change, named, tmp_path):
    killed(tmp_path, 2)
    with pytest.raises(
        ValueError, match=rf"importance-000.* holds importances of .*{named}.*delete it"
    ):
        run(tmp_path, **change)


def test_work_without_need_is_not_kept(tmp_path):
    run(tmp_path, dataclasses.replace(QUICK, run=RunConfig(save_every=None)))
    assert list(tmp_path.iterdir()) == []


def test_copies_come_no_more_often_than_asked(tmp_path):
    config = dataclasses.replace(QUICK, run=RunConfig(save_every=3600))
    run(tmp_path, config)
    assert names(tmp_path) == BEFORE_MODEL
    discard(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_deleted_is_said(tmp_path, caplog):
    (tmp_path / "unfinished-old.safetensors").mkdir()
    (tmp_path / TORN).mkdir()
    (tmp_path / TORN / ".tmpUachCM").write_bytes(b"torn")
    discard(tmp_path)
    assert "unfinished-old.safetensors can't be deleted" in caplog.text
    assert not (tmp_path / TORN).exists()


def test_settings_can_be_checked_before_anything_is_done(tmp_path):
    killed(tmp_path, 2)
    plan, other = plan_text(TOKENS, None, QUICK), plan_text(TOKENS.flip(0), None, QUICK)
    check_settings(tmp_path, tiny_llama(), plan, QUICK)
    check_settings(tmp_path / "none", tiny_llama(), plan, QUICK)
    longer = dataclasses.replace(QUICK, admm=ADMMConfig(iterations=3))
    for model, text, config, named in (
        (tiny_llama(layers=3), plan, QUICK, "model weights"),
        (tiny_llama(), plan, longer, "admm.iterations"),
        (tiny_llama(), other, QUICK, "text '"),
    ):
        with pytest.raises(ValueError, match=named):
            check_settings(tmp_path, model, text, config)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("nanoquant.__version__", "version '0.1.0', not '9'"),
        ("nanoquant.unfinished.code_digest", "nanoquant's source code '[0-9a-f]{16}', not '9'"),
        ("nanoquant.unfinished.torch", "torch '[^']*', not '9'"),
        ("nanoquant.unfinished.transformers", "transformers '[^']*', not '9'"),
    ],
)
def test_work_of_other_code_is_refused(where, named, tmp_path, monkeypatch):
    killed(tmp_path, 2)
    other = {"code_digest": lambda: "9", "__version__": "9"}
    library = SimpleNamespace(__version__="9")
    monkeypatch.setattr(where, other.get(where.rpartition(".")[2], library))
    with pytest.raises(ValueError, match=named):
        run(tmp_path)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    expected, _, _ = run(None)
    hours = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: next(hours))
    killed(tmp_path, 20)
    found, report, counts = run(tmp_path)
    assert counts["model"] == [24, 24] and all(s >= 0 for s in report.seconds.values())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_damaged_file_is_named(tmp_path):
    killed(tmp_path, 2)
    (tmp_path / "unfinished-model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"unfinished-model.safetensors can't be read .*delete it"):
        run(tmp_path)


def test_a_folder_that_can_not_be_written_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("")
    progress = Killed()
    with pytest.raises(ValueError, match="unfinished work in .* can't be made: .* is a file"):
        quantize(tiny_llama(), TOKENS, QUICK, progress=progress, work=tmp_path / "file")
    assert progress.counts == {}


def test_a_write_that_is_killed_leaves_the_file_before_it(tmp_path, monkeypatch):
    file = TensorFile(tmp_path / "a.safetensors", {"of": "this"}, "tensors")
    file.write({"x": torch.ones(3)}, {"step": 1})
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        file.write({"x": torch.zeros(3)}, {"step": 2})
    assert file.values() == {"step": 1} and torch.equal(file.read().tensors["x"], torch.ones(3))
