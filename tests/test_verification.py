"""A checkpoint that is not whole fails its verification by name; a run verifies what it has written."""

import json
from dataclasses import replace

import pytest
import torch
from command_line import SMALL, call
from packed_models import pack_randomly
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_gemma3, tiny_gpt2, tiny_llama, tiny_tokenizer

from nanoquant import verification
from nanoquant.checkpoint import save_pretrained
from nanoquant.figures import Figures
from nanoquant.finish import Ending
from nanoquant.generate import Generation
from nanoquant.job_config import JobConfig
from nanoquant.verification import Verification, check_generation, check_perplexity

pytestmark = pytest.mark.usefixtures("untouched_process")

NAMES = ["load", "finite", "coverage", "generation"]
RECIPE = {"config": {"blocks": ""}}


def save(folder, model, recipe=RECIPE):
    return save_pretrained(model, folder, tokenizer=tiny_tokenizer(), recipe=recipe)


def verify(capsys, folder, *flags):
    """Exit code, checks by name, and all that was printed."""
    file = folder.parent / "checks.json"
    code, out, err = call(capsys, "evaluate", folder, "--verify", "--json", file, *flags)
    record = json.loads(file.read_text())
    return code, {check["name"]: check for check in record["verification"]}, out, err, record


def change(folder, edit):
    """Write the weights again, changed by ``edit``."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", about)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_gpt2])
def test_a_whole_checkpoint_passes_without_any_text(make, tmp_path, capsys):
    code, checks, out, err, _ = verify(capsys, save(tmp_path / "out", pack_randomly(make())))
    assert code == 0, err
    assert list(checks) == NAMES and all(check["ok"] for check in checks.values())
    (line,) = (line for line in out.splitlines() if line.startswith("verified: "))
    assert "blocks packed" in line and "tensors finite" in line and "8 tokens generated" in line


def test_a_value_that_is_not_finite_is_named(tmp_path, capsys):
    folder = save(tmp_path / "out", pack_randomly(tiny_llama()))
    change(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(torch.nan))
    code, checks, out, err, _ = verify(capsys, folder)
    assert code == 2 and "model.norm.weight holds a value that is not finite" in err
    assert list(checks) == NAMES[:1] and not checks["load"]["ok"]
    assert "NOT verified: load: model.norm.weight holds a value that is not finite" in out


def test_scales_that_a_disk_lost_are_named(tmp_path, capsys):
    folder = save(tmp_path / "out", pack_randomly(tiny_llama()))
    change(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.s1"].zero_())
    code, checks, _, err, _ = verify(capsys, folder)
    assert code == 2 and "nothing but zeros in model.layers.1.mlp.up_proj.s1" in err
    assert list(checks) == NAMES[:2] and not checks["finite"]["ok"]


def test_a_linear_that_was_left_dense_is_named(tmp_path, capsys):
    model, name = pack_randomly(tiny_llama()), "model.layers.1.mlp.up_proj"
    model.set_submodule(name, tiny_llama().get_submodule(name))
    code, checks, _, err, _ = verify(capsys, save(tmp_path / "out", model))
    assert code == 2 and f"1 linears of the chosen blocks are dense: {name}" in err
    assert list(checks) == NAMES[:3] and not checks["coverage"]["ok"]


def test_packed_linears_of_blocks_that_were_not_chosen_are_named(tmp_path, capsys):
    folder = save(tmp_path / "out", pack_randomly(tiny_llama()), {"config": {"blocks": "0:1"}})
    code, checks, _, err, _ = verify(capsys, folder)
    assert code == 2 and "7 linears of blocks that were not chosen are packed" in err
    assert not checks["coverage"]["ok"]


def test_a_checkpoint_without_a_recipe_is_as_whole_as_it_says(tmp_path, capsys):
    code, checks, *_ = verify(capsys, save(tmp_path / "out", pack_randomly(tiny_llama()), {}))
    assert code == 0 and checks["coverage"]["found"] == "14 linears packed"


def test_a_tensor_that_is_missing_is_named(tmp_path, capsys):
    folder = save(tmp_path / "out", pack_randomly(tiny_llama()))
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.s1"))
    code, checks, _, err, _ = verify(capsys, folder)
    assert code == 2 and "up_proj.s1" in err and not checks["load"]["ok"]


def test_a_perplexity_above_the_guard_fails_and_is_on_record(tmp_path, capsys, place):
    folder = save(tmp_path / "out", pack_randomly(tiny_llama()))
    text = ["--text", place / "text.txt", "--windows", 2, "--length", 16]
    for most, passes in ((1e6, True), (1.5, False)):
        code, checks, _, err, record = verify(capsys, folder, *text, "--most-perplexity", most)
        assert (code == 0) == passes == checks["perplexity"]["ok"]
        assert record["results"]["text"]["perplexity"] > 1.5
    assert "at most 1.5 passes" in err
    with pytest.raises(ValueError, match="perplexity is nan"):
        check_perplexity(float("nan"), float("inf"))


def test_a_generation_has_text_and_finite_logits(monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    done = Generation(texts=["ab"], new_tokens=[2])
    assert check_generation(model, tokenizer, "The", done) == "2 tokens generated"
    with pytest.raises(ValueError, match="ends 'The' at once"):
        check_generation(model, tokenizer, "The", Generation(texts=[""], new_tokens=[1]))
    monkeypatch.setattr(verification, "window_logits", lambda *_: torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match="logits of a generated text are not finite"):
        check_generation(model, tokenizer, "The", done)


def test_nothing_that_was_not_reached_is_called_verified():
    assert Verification().line().startswith("NOT verified")


def test_a_run_verifies_what_it_wrote(figures, finished, place):
    checks = figures["verification"]
    assert [check["name"] for check in checks] == [*NAMES, "perplexity"]
    assert all(check["ok"] for check in checks)
    (line,) = (line for line in finished.stdout.splitlines() if line.startswith("verified: "))
    assert line == Verification(checks).line() and "all 14 linears of 2 blocks packed" in line


def test_the_guard_is_that_of_guessing_unless_the_dense_model_does_no_better():
    job = JobConfig(source="dense", output="out", text="a.txt")
    found = [
        Ending.of(replace(job, eval_guard=guard), tiny_llama(), Figures(0, {}, value), Report)
        for guard, value in ((1.0, None), (1.0, 20.0), (0.5, 20.0), (1.0, 129.0), (None, 20.0))
    ]
    assert [ending.most_perplexity for ending in found] == [128, 128, 64, None, None]


class Report:
    to_dict = dict


@pytest.mark.slow
def test_a_run_that_fails_its_guard_leaves_checkpoint_and_record(
    place, tmp_path, capsys, monkeypatch
):
    ending = Ending.of
    monkeypatch.setattr(Ending, "of", lambda *given: replace(ending(*given), most_perplexity=1.5))
    flags = ["--text", place / "text.txt", "--eval-text", place / "text.txt", "--eval-windows", 2]
    flags += ["--eval-length", 16, *SMALL, "--verify"]
    code, out, _ = call(capsys, "quantize", place / "dense", tmp_path / "new", *flags)
    assert code == 2 and "at most 1.5 passes" in out and "NOT verified: perplexity" in out
    assert (tmp_path / "new" / "config.json").is_file()
    run = json.loads((tmp_path / "new.run" / "run.json").read_text())
    assert run["status"] == "failed" and run["figures"]["quantized"]["perplexity"] > 1
    assert run["figures"]["verification"][-1]["ok"] is False
