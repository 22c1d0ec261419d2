"""Windows that the dense model writes: repeatable, kept in a file, gone on with after an interruption."""

import dataclasses
import json

import pytest
import torch
from command_line import SMALL, call, refused
from safetensors.torch import load_file
from tiny_models import VOCAB, random_windows, tiny_gpt2, tiny_llama, tiny_tokenizer

from nanoquant.config import NanoQuantConfig, nanoquant_config
from nanoquant.data import load_tokens
from nanoquant.progress import Progress
from nanoquant.quantize import quantize
from nanoquant.self_text import PHASE, SelfText, SelfTextConfig

CONFIG = SelfTextConfig(batch=4)


class Stopped(Progress):
    """Follows a phase, and interrupts it after some steps."""

    def __init__(self, steps=10**9):
        super().__init__()
        self.steps, self.total, self.done = steps, 0, 0

    def begin(self, name, total):
        assert name == PHASE
        self.total, self.done = total, 0

    def advance(self, done, note=""):
        assert "tokens a second" in note
        self.done, self.steps = self.done + done, self.steps - 1
        if self.steps < 0:
            raise KeyboardInterrupt


def writer(file=None, progress=None, seed=0, model=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return SelfText(model or tiny_llama(), tiny_tokenizer(), config, seed, file, progress)


def test_the_same_seed_writes_the_same_windows_and_every_window_is_another():
    progress = Stopped()
    one, same, other = writer(progress=progress)(10, 16), writer()(10, 16), writer(seed=1)(10, 16)
    assert one.shape == (10, 16) and one.dtype == torch.int64
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one.unique(dim=0)) == 10 and (progress.done, progress.total) == (160, 160)


def test_batches_do_not_decide_what_is_written():
    assert torch.equal(writer(batch=3)(7, 16), writer(batch=7)(7, 16))


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(tmp_path):
    file = tmp_path / "made" / "windows.safetensors"
    with pytest.raises(KeyboardInterrupt):
        writer(file, Stopped(steps=40))(10, 16)  # in the third batch
    kept = load_file(file)["tokens"]
    assert len(kept) == 8
    progress = Stopped()
    whole = writer(file, progress)(10, 16)
    assert torch.equal(whole, writer()(10, 16)) and torch.equal(whole[:8].int(), kept)
    assert progress.total == 2 * 16


def test_a_file_is_shared_cut_and_continued(tmp_path):
    whole = writer(tmp_path)(8, 16)
    progress = Stopped(steps=0)
    assert torch.equal(writer(tmp_path, progress)(5, 16), whole[:5])
    assert len(list(tmp_path.iterdir())) == 1
    more = writer(tmp_path)(9, 16)
    assert torch.equal(more[:8], whole)
    assert torch.equal(writer(tmp_path, Stopped(steps=0))(9, 16), more)


def test_a_folder_keeps_windows_of_different_settings_apart(tmp_path):
    writer(tmp_path)(2, 16)
    for changes in ({"seed": 1}, {"temperature": 0.5}, {"first": 3}, {"model": tiny_gpt2()}):
        writer(tmp_path, **changes)(2, 16)
    writer(tmp_path)(2, 17)
    writer(tmp_path)(2, 16, random_windows(5, 4))
    assert len(list(tmp_path.glob("self_text-*.safetensors"))) == 7


def test_the_file_can_be_read_as_text(tmp_path):
    file = tmp_path / "windows.safetensors"
    windows = writer(file)(5, 16)
    assert torch.equal(load_tokens(file, tiny_tokenizer()), windows.flatten())


def test_another_setting_in_the_file_is_named(tmp_path):
    file = tmp_path / "windows.safetensors"
    writer(file)(2, 16)
    with pytest.raises(ValueError, match="windows of temperature '1.0', not '0.5'; delete it, or"):
        writer(file, temperature=0.5)(2, 16)
    tuned = tiny_llama()
    tuned.model.layers[1].mlp.down_proj.weight.data[-1] *= 1.01
    for other in (tiny_llama(layers=1), tuned):
        with pytest.raises(ValueError, match="windows of model '.*', not '"):
            writer(file, model=other)(2, 16)


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "windows.safetensors"
    file.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"windows\.safetensors can't be read .*delete it"):
        writer(file)(2, 16)


def test_a_file_that_can_not_be_written_ends_the_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="windows.safetensors can't be written .*the same command"):
        writer(tmp_path / "file" / "windows.safetensors")(10, 16)


def test_the_same_tokens_cut_into_other_beginnings_are_other_settings():
    text = random_windows(1, 12)
    settings = [writer()._settings(16, text.view(-1, length)) for length in (3, 4)]
    assert settings[0] != settings[1]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), None], ids=["tokenizer", "none"])
def test_ends_that_can_not_be_drawn_are_no_ends(tokenizer):
    model, same = tiny_llama(), tiny_llama()
    model.generation_config.eos_token_id = [2, VOCAB + 5, len(tokenizer or range(VOCAB))]
    one, other = (SelfText(m, tokenizer, CONFIG)(4, 16) for m in (model, same))
    assert torch.equal(one, other)


def test_any_seed_of_a_generator_will_do():
    assert writer(seed=2**63)(2, 4).shape == (2, 4)


def test_windows_go_on_from_their_beginnings_in_turn():
    pool = random_windows(3, 4, vocab=100)
    windows = writer()(7, 16, pool)
    assert torch.equal(windows[:, :4], pool[[0, 1, 2, 0, 1, 2, 0]])
    assert not torch.equal(windows[0], windows[3])
    progress = Stopped()
    writer(progress=progress)(7, 16, pool)
    assert progress.total == progress.done == 7 * 12


def test_windows_hold_only_tokens_of_the_tokenizer_and_of_the_model():
    assert writer()(20, 30).max() < len(tiny_tokenizer()) < VOCAB
    assert SelfText(tiny_llama(), None, CONFIG)(20, 30).max() >= len(tiny_tokenizer())


@pytest.mark.parametrize(("bos", "eos"), [(1, 2), (None, 2), (None, None)])
def test_a_model_without_bos_begins_after_its_end_or_a_random_token(bos, eos):
    model = tiny_llama()
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = bos, eos
    asked = []
    model.register_forward_pre_hook(
        lambda *call: asked.append(call[2]["input_ids"]), with_kwargs=True
    )
    writer(model=model)(4, 3)
    begun = asked[0].flatten().tolist()
    wanted = bos if bos is not None else eos
    assert begun == [wanted] * 4 if wanted is not None else len(set(begun)) > 1


def test_bos_is_read_but_left_to_those_who_put_it_in_front():
    model, pool = tiny_llama(), random_windows(3, 4, vocab=100)
    asked = []
    model.register_forward_pre_hook(
        lambda *call: asked.append(call[2]["input_ids"]), with_kwargs=True
    )
    windows = SelfText(model, tiny_tokenizer(add_bos=True), CONFIG)(3, 8, pool)
    assert asked[0][:, 0].tolist() == [1, 1, 1] and torch.equal(asked[0][:, 1:], pool)
    assert torch.equal(windows[:, :4], pool)


def test_python_quantizes_without_any_text(tmp_path):
    config = nanoquant_config(
        bits=1.4,
        budget=dataclasses.replace(NanoQuantConfig().budget, bits=1.4, rank_multiple=8),
        calibration=dataclasses.replace(NanoQuantConfig().calibration, windows=2, length=16),
        model=dataclasses.replace(NanoQuantConfig().model, windows=4, held_out=2),
        block=dataclasses.replace(NanoQuantConfig().block, dense_epochs=0, refine_epochs=0),
    )
    model = tiny_llama()
    assert not any(p.grad is not None for p in model.parameters())
    report = quantize(model, "self", config, self_text_file=tmp_path)
    assert [*report.text[0]["counts"].values()] == [2, 4, 2] and PHASE in report.seconds
    assert report.model.held_out
    again = quantize(tiny_llama(), "self", config, self_text_file=tmp_path)
    assert again.model.held_out == report.model.held_out


def test_the_command_writes_text_and_a_restarted_run_goes_on_with_it(
    place, tmp_path, capsys, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    flags = [
        "--text",
        place / "text.txt",
        "--self-text.windows",
        6,
        "--self-text.prompt",
        8,
        *SMALL,
    ]
    with monkeypatch.context() as patch:
        patch.setattr("nanoquant.job.save_pretrained", interrupt)
        code, _, _ = call(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert code == 130
    kept = next((tmp_path / "new.run").glob("self_text-*.safetensors"))
    before = kept.stat().st_mtime_ns
    code, _, err = call(
        capsys, "quantize", place / "dense", tmp_path / "new", *flags, "--json", tmp_path / "a.json"
    )
    assert code == 0, err
    assert f"{PHASE}" in err and kept.stat().st_mtime_ns == before
    text = json.loads((tmp_path / "a.json").read_text())["report"]["text"]
    assert [[*part["counts"].values()] for part in text] == [[4, 8, 2], [0, 6, 0]]
    assert text[0]["source"] == str(place / "text.txt")


def test_the_command_mixes_texts(place, tmp_path, capsys):
    line = refused(
        capsys,
        "quantize",
        place / "dense",
        tmp_path / "new",
        "--text",
        place / "text.txt",
        "--text",
        "self",
        *SMALL,
    )
    assert "has no weight" in line and not (tmp_path / "new.run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--text", "self", "--self-text-file", "a.pt"],
            "a.pt must be a .safetensors file or a folder",
        ),
        (["--text", "text.txt", "--self-text-file", "a.safetensors"], "the model writes nothing"),
    ],
)
def test_a_file_for_written_text_that_cannot_serve_is_refused(
    place, tmp_path, capsys, flags, message
):
    flags = [place / flag if flag == "text.txt" else flag for flag in flags]
    line = refused(capsys, "quantize", place / "dense", tmp_path / "new", *flags, *SMALL)
    assert message in line and not (tmp_path / "new.run").exists()


def test_a_file_of_other_windows_is_refused_before_any_work(place, tmp_path, capsys):
    file = tmp_path / "windows.safetensors"
    writer(file)(2, 32)
    flags = ["--text", "self", "--self-text-file", file, *SMALL]
    line = refused(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert "holds windows of model" in line and not (tmp_path / "new.run").exists()
