"""What is kept of a teacher is what its forward pass gives, and a student learns from it without the teacher."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_mapped import is_mapped
from test_model_reconstruction import HELD_OUT, SIGNS, TRAINING, teacher_and_student
from test_unfinished import QUICK, TOKENS, Killed, killed, names, run
from tiny_models import FAMILIES, VOCAB, random_windows, tiny_llama
from torch import nn
from torch.utils.data import TensorDataset

from nanoquant import kept_logits
from nanoquant.architectures import find_decoder
from nanoquant.divergence import most_probable
from nanoquant.kept_logits import KEPT, bytes_a_token, collate, keep_logits, portion
from nanoquant.model_config import ModelConfig
from nanoquant.model_reconstruction import ModelReconstructor
from nanoquant.quantize import quantize

WINDOWS = random_windows(5, 16)
BRIEF = dataclasses.replace(QUICK, model=dataclasses.replace(QUICK.model, epochs=1))
KEEPING = dataclasses.replace(QUICK, model=dataclasses.replace(QUICK.model, kept_logits=4))


def rows(teacher, windows, k):
    found = keep_logits(teacher, find_decoder(teacher), windows, k, "32-true")
    return TensorDataset(windows, *(found[name] for name in KEPT))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_whole_forward_pass_gives(family):
    model = FAMILIES[family]()
    found = keep_logits(model, find_decoder(model), WINDOWS, 6, "32-true")
    with torch.no_grad():
        logits = model(input_ids=WINDOWS, use_cache=False).logits
    expected = most_probable(logits.flatten(0, 1), 6)
    for name, tensor in zip(KEPT, expected, strict=True):
        torch.testing.assert_close(found[name].flatten(0, 1), tensor, rtol=1e-4, atol=1e-5)
    assert sum(t.nbytes for t in found.values()) == bytes_a_token(6) * WINDOWS.numel()
    assert not any("forward" in vars(block) for block in find_decoder(model).blocks)


class Block(nn.Module):
    """Gives a tuple, as older model code does."""

    def __init__(self, more):
        super().__init__()
        self.up, self.down, self.more = nn.Linear(8, 16), nn.Linear(16, 8), more

    def forward(self, hidden_states):
        return hidden_states + self.down(self.up(hidden_states).relu()), *self.more


class Tuples(nn.Module):
    """A model of such blocks."""

    def __init__(self, more):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.layers = nn.ModuleList(Block(more) for _ in range(2))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)[0]
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("more", [(), (None,)])
def test_blocks_that_return_tuples_are_run_as_the_model_calls_them(more):
    model = Tuples(more)
    found = keep_logits(model, find_decoder(model), WINDOWS, 6, "32-true")
    with torch.no_grad():
        expected = most_probable(model(WINDOWS).logits.flatten(0, 1), 6)
    for name, tensor in zip(KEPT, expected, strict=True):
        torch.testing.assert_close(found[name].flatten(0, 1), tensor)


def test_autocast_is_that_of_the_training():
    model = tiny_llama()
    found = keep_logits(model, find_decoder(model), WINDOWS, 6, "bf16-mixed")["log_p"]
    plain = keep_logits(model, find_decoder(model), WINDOWS, 6, "32-true")["log_p"]
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=0.1)


@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_all_tokens_kept_train_like_the_teacher(hard):
    teacher, student = teacher_and_student()
    other, config = copy.deepcopy(student), dataclasses.replace(SIGNS, hard_labels=hard)
    whole = ModelReconstructor(config)(student, teacher, TRAINING, HELD_OUT)
    kept = (rows(teacher, windows, VOCAB) for windows in (TRAINING, HELD_OUT))
    report = ModelReconstructor(config)(other, None, *kept)
    assert report.losses[:2] == pytest.approx(whole.losses[:2], rel=1e-4)
    assert report.losses == pytest.approx(whole.losses, rel=5e-3)  # rounding flips signs near 0
    assert report.held_out[0] == pytest.approx(whole.held_out[0], rel=1e-5)


def test_a_few_tokens_lower_the_divergence_of_all():
    teacher, student = teacher_and_student()
    before = copy.deepcopy(student)
    kept = (rows(teacher, windows, 8) for windows in (TRAINING, HELD_OUT))
    ModelReconstructor(SIGNS)(student, None, *kept)
    nothing = dataclasses.replace(SIGNS, latent_lr=1e-12, scale_lr=1e-12, epochs=1)
    first, last = (
        ModelReconstructor(nothing)(model, teacher, TRAINING[:4], HELD_OUT).held_out[0]
        for model in (before, student)
    )
    assert last < 0.9 * first


def test_a_run_writes_it_beside_its_other_work_and_goes_on_with_it(tmp_path, monkeypatch):
    expected, whole, _ = run(None, KEEPING)
    killed(tmp_path, 20, config=KEEPING)
    files = [name for name in names(tmp_path) if "logits" in name]
    assert files == [f"unfinished-logits-{n}-000.safetensors" for n in ("held-out", "training")]
    monkeypatch.setattr(kept_logits, "most_probable", None)  # nothing is made again
    found, report, _ = run(tmp_path, KEEPING)
    assert report.model == whole.model
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("part", ["training", "held-out"])
def test_a_damaged_file_is_refused_at_once_by_name(part, tmp_path):
    killed(tmp_path, 20, config=KEEPING)
    file = tmp_path / f"unfinished-logits-{part}-000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    progress = Killed()
    with pytest.raises(
        ValueError, match=f"{file.name} can't be read .*logits of the teacher will be made anew"
    ):
        quantize(tiny_llama(), TOKENS, KEEPING, progress=progress, work=tmp_path)
    assert progress.counts == {}
    file.unlink()
    run(tmp_path, KEEPING)


def test_portions_of_windows_change_nothing(tmp_path, monkeypatch):
    expected, whole, _ = run(None, KEEPING)
    monkeypatch.setattr(kept_logits, "PORTION", 16 * (4 * 64 + bytes_a_token(4)) * 3 + 1)
    assert portion(tiny_llama(), 16, 4) == 3
    found, report, _ = run(tmp_path, KEEPING)
    assert [name for name in names(tmp_path) if "training" in name] == [
        f"unfinished-logits-training-{n:03}.safetensors" for n in range(3)
    ]
    assert report.model.losses == pytest.approx(whole.model.losses, rel=1e-4)
    assert found.keys() == expected.keys()


def test_kept_rows_lie_in_their_file_and_are_forgotten_when_they_are_read(tmp_path, monkeypatch):
    seen = []

    def look(batch):
        seen.append([is_mapped(tensor) for row in batch for tensor in row[1:]])
        return collate(batch)

    monkeypatch.setattr("nanoquant.model_reconstruction.collate", look)
    run(tmp_path, KEEPING)
    assert seen and all(all(mapped) for mapped in seen)


def test_blocks_that_are_called_with_the_text_are_refused_before_anything_runs(tmp_path):
    model, progress = tiny_llama(), Killed()
    block, embed = model.model.layers[1], model.get_input_embeddings()
    seen = {}
    embed.register_forward_hook(lambda _, args, output: seen.update(text=output))
    block.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"text": seen["text"]}),
        with_kwargs=True,
        prepend=True,
    )
    plain = block.forward
    block.forward = lambda hidden, text=None, **others: plain(hidden, **others)
    with pytest.raises(ValueError, match="model.layers.1 receives tensors that depend on the text"):
        quantize(model, TOKENS, KEEPING, progress=progress, work=tmp_path)
    assert progress.counts == {} and names(tmp_path) == []
    quantize(model, TOKENS, BRIEF, progress=Killed())


@pytest.mark.parametrize("value", [0, -3])
def test_fewer_than_one_token_are_refused(value):
    with pytest.raises(ValueError, match="kept_logits must be at least 1"):
        ModelConfig(kept_logits=value)


def test_more_tokens_than_there_are_are_refused_before_anything_runs():
    config = dataclasses.replace(QUICK, model=dataclasses.replace(QUICK.model, kept_logits=129))
    with pytest.raises(ValueError, match="more than the 128 tokens that the model knows"):
        quantize(tiny_llama(), random_windows(24, 16).flatten(), config)
