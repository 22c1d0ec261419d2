"""The commands evaluate, generate and inspect as a user meets them."""

import json
import re

import pytest
import torch
from command_line import call
from packed_models import pack_randomly
from tiny_models import tiny_llama

from nanoquant.checkpoint import save_pretrained

pytestmark = pytest.mark.usefixtures("untouched_process")


def test_checkpoint_gives_the_same_figures_again(place, figures, capsys):
    flags = [
        "--text",
        place / "text.txt",
        "--windows",
        4,
        "--length",
        32,
        "--json",
        place / "again.json",
    ]
    code, out, _ = call(
        capsys, "evaluate", place / "out", *flags, "--sample", "the river", "--sample-tokens", 5
    )
    again = json.loads((place / "again.json").read_text())
    assert code == 0
    found = again["results"]["text"]["perplexity"]
    assert found == pytest.approx(figures["quantized"]["perplexity"], rel=1e-12)
    assert again["sample"] == figures["quantized"]["sample"]
    assert f"perplexity {found:.4f}" in out


def test_evaluate_works_on_the_dense_model_too(place, figures, capsys):
    flags = [
        "--text",
        place / "text.txt",
        "--windows",
        4,
        "--length",
        32,
        "--json",
        place / "dense.json",
    ]
    assert call(capsys, "evaluate", place / "dense", *flags)[0] == 0
    assert (
        json.loads((place / "dense.json").read_text())["results"]["text"]["perplexity"]
        == figures["dense"]["perplexity"]
    )


def test_generate_continues_a_prompt_and_writes_every_printed_figure(place, figures, capsys):
    flags = ["--prompt", "the river", "--max-new-tokens", 5, "--json", place / "text.json"]
    code, out, err = call(capsys, "generate", place / "out", *flags)
    found = json.loads((place / "text.json").read_text())
    assert (code, out) == (0, figures["quantized"]["sample"] + "\n")
    assert found["texts"] == [figures["quantized"]["sample"]]
    assert (found["prompt_tokens"], found["settings"]["max_new_tokens"]) == ([9], 5)
    printed = [float(number.replace(",", "")) for number in re.findall(r"[\d.,]*\d", err)]
    names = ["prefill_seconds", "prefill_tokens_per_second", "decode_tokens", "decode_seconds"]
    names += ["decode_tokens_per_second", "step_seconds"]
    assert printed == pytest.approx([9, *(found[name] for name in names)], rel=0.01, abs=1e-3)


def test_generate_continues_several_prompts_each_under_its_own(place, finished, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("stone\nan old town\n")
    prompts = ["the river", "light", "stone", "an old town"]
    flags = ["--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 5]
    flags += ["--prompts", tmp_path / "prompts.txt", "--batch", 3, "--json", tmp_path / "all.json"]
    code, out, _ = call(capsys, "generate", place / "out", *flags)
    found = json.loads((tmp_path / "all.json").read_text())
    assert code == 0 and found["prompts"] == prompts
    parts = [
        f"> {prompt}\n{text}\n\n" for prompt, text in zip(prompts, found["texts"], strict=True)
    ]
    assert sorted(out.split("> ")) == sorted(["", *(part[2:] for part in parts)])


def test_inspect_shows_ranks_and_recipe_without_reading_weights(
    place, figures, capsys, monkeypatch
):
    monkeypatch.setattr("safetensors.torch.load_file", None)
    code, out, _ = call(capsys, "inspect", place / "out", "--json", place / "inspect.json")
    found = json.loads((place / "inspect.json").read_text())
    assert code == 0 and "self_attn.q_proj" in out and "config.admm: iterations=20" in out
    assert found["sizes"] == figures["quantized"]["sizes"]
    assert found["recipe"]["config"] == figures["report"]["config"]
    assert sum(kind["count"] for kind in found["layers"].values()) == len(
        figures["report"]["ranks"]
    )


def test_inspect_names_a_packed_head_and_counts_the_bits_of_its_tensors(tmp_path, capsys):
    model = pack_randomly(tiny_llama(), head=True, scale_dtype=torch.float32)
    save_pretrained(model, tmp_path / "out")
    assert call(capsys, "inspect", tmp_path / "out", "--json", tmp_path / "inspect.json")[0] == 0
    head = json.loads((tmp_path / "inspect.json").read_text())["layers"]["lm_head"]
    assert head["count"] == 1
    assert head["bits"] == round(model.lm_head.bits / (128 * 64), 4)
