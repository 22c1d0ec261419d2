"""A checkpoint finds its way to a hub and back, with a card that says what is known of it and nothing else."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from command_line import call, refused
from fake_hub import fake_hub
from huggingface_hub import ModelCard, constants
from test_unfinished import QUICK, TOKENS
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant import finish as ending
from nanoquant.checkpoint import save_pretrained
from nanoquant.config import nanoquant_config
from nanoquant.figures import Figures
from nanoquant.hub.publish import push, write_card
from nanoquant.hub.reproduce import quantize_line
from nanoquant.job_config import JobConfig
from nanoquant.model_folder import resolve_folder
from nanoquant.parsers import parse_quantize
from nanoquant.quantize import quantize

pytestmark = pytest.mark.usefixtures("untouched_process")


@pytest.fixture
def copied(place, finished, tmp_path):
    """A copy of the finished checkpoint and of the record of its run."""
    for name in ("out", "out.run"):
        shutil.copytree(place / name, tmp_path / name)
    return tmp_path / "out"


def test_a_run_writes_the_card_of_its_checkpoint(place, finished):
    card = ModelCard((place / "out" / "README.md").read_text())
    record = json.loads((place / "out.run" / "run.json").read_text())
    figures = record["figures"]
    assert card.data.tags[0] == "nanoquant" and card.data.library_name == "transformers"
    assert "base_model" not in card.data.to_dict()  # the dense model is a folder of this machine
    for known in (
        f"{figures['quantized']['sizes']['body_bits_per_weight']:.4f} bits per weight",
        f"| dense | 16 | 16.0000 | {figures['dense']['file_bytes']:,} |",
        f"{figures['quantized']['perplexity']:.2f} |",
        "4 windows of 32 tokens of `text.txt`",
        "`text.txt` (",
        "nanoquant quantize dense OUT --text text.txt --preset fast --bits 1.0 ",
        "nanoquant generate out",
        "expect wrong answers",
    ):
        assert known in card.text, known
    assert str(place) not in card.text and "all others dense" not in card.text


def test_a_card_says_which_blocks_are_quantized(copied):
    file = copied / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["recipe"]["config"]["blocks"] = "0:1"
    file.write_text(json.dumps(config))
    text = write_card(copied).read_text()
    assert "in its linears of decoder blocks 0:1, all others dense." in text


def test_licence_and_language_of_the_dense_model_are_carried_over_and_kept(copied):
    (copied / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlanguage: [en, de]\ntags: [chat]\n---\n# Dense\n"
    )
    for _ in range(2):  # the second time from its own card
        head = ModelCard(write_card(copied).read_text()).data.to_dict()
        assert (head["license"], head["license_name"]) == ("other", "own")
        assert head["language"] == ["en", "de"] and "chat" not in head["tags"]
    head = ModelCard(write_card(copied, license="mit").read_text()).data.to_dict()
    assert head["license"] == "mit" and "license_name" not in head


def test_a_head_that_can_not_be_read_is_named_and_ends_no_run(copied, capsys, monkeypatch, caplog):
    (copied / "README.md").write_text("---\n[broken\n---\n# Dense\n")
    assert "README.md has a head that is no YAML mapping" in refused(capsys, "card", copied)
    record = json.loads((copied.with_name("out.run") / "run.json").read_text())
    job, figures = JobConfig(**record["job"]), record["figures"]
    tracker = SimpleNamespace(folder=SimpleNamespace(content=record, update=lambda **_: None))
    tracker.record = lambda *_, **__: None
    job = dataclasses.replace(job, output=str(copied), json=None)
    monkeypatch.setattr(ending, "measure_in_fresh_process", lambda *_: None)
    progress = SimpleNamespace(phase=lambda *_: nullcontext(), seconds={})
    left = ending.Ending(Figures(**figures["dense"]), figures["report"], None)
    result = ending.finish(job, torch.device("cpu"), tracker, progress, left)
    assert result.quantized.file_bytes == figures["quantized"]["file_bytes"]
    assert "no model card was written" in caplog.text


def test_a_checkpoint_whose_run_is_not_at_hand_says_what_is_unknown(copied, capsys):
    shutil.rmtree(copied.with_name("out.run"))
    before = (copied / "README.md").read_text()
    code, out, err = call(capsys, "card", copied)
    assert code == 0 and out.strip() == str(copied / "README.md"), err
    text = (copied / "README.md").read_text()
    assert text == before  # what nothing here could tell again

    (copied / "README.md").unlink()
    code, out, err = call(capsys, "card", copied, "--license", "mit")
    text = (copied / "README.md").read_text()
    assert "not measured" in text and "record of its run is not at hand" in text
    assert "| dense" not in text and "license: mit" in text


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"config": {"unheard": 1}}, "by a version of nanoquant with other settings"),
        ({"imported": "state.pt"}, "Its signs and scales are those of `state.pt`"),
        ({}, "It is not on record how."),
        (
            {
                "config": nanoquant_config().to_dict(),
                "base_model": "owner/dense",
                "source": "owner/dense",
            },
            "base_model: owner/dense\n",
        ),
        (
            {
                "config": nanoquant_config().to_dict(),
                "fine_tuning": {"text": "/home/me/own.txt", "teacher": "owner/dense"},
            },
            "then trained to give what `owner/dense` gives on `own.txt`.",
        ),
    ],
)
def test_a_card_says_what_a_recipe_can_tell(copied, recipe, said):
    file = copied / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["recipe"] = recipe
    file.write_text(json.dumps(config))
    assert said in write_card(copied, anew=True).read_text()


def test_a_model_that_python_quantized_tells_how_it_was_made(tmp_path):
    model = tiny_llama()
    model.name_or_path = "owner/dense"  # as from_pretrained leaves it
    quantize(model, TOKENS, QUICK)
    folder = save_pretrained(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    text = write_card(folder).read_text()
    assert "base_model: owner/dense\n" in text and "of `owner/dense` with 1.4000 bits" in text
    assert "`tokens`" in text and "It is not on record how" not in text


def test_a_card_of_another_run_is_not_made_from_this_record(copied):
    file = copied.with_name("out.run") / "run.json"
    record = json.loads(file.read_text())
    record["figures"]["report"]["seconds"]["pack"] += 1
    file.write_text(json.dumps(record))
    assert "not measured" in write_card(copied, anew=True).read_text()


def test_the_line_that_reproduces_gives_the_same_job_and_configuration():
    given = (
        "owner/name OUT --text a.txt=3 --text b.txt --preset balanced --bits 0.8 --model.recompute "
        "--model.kept_logits 8 --eval-text test.txt --eval-windows 9 --sample hello --run.seed 4 "
        "--embedding.bits 8 --blocks 0:3 --no-such"
    ).split()[:-1]
    job, config = parse_quantize(given)
    line = quantize_line(vars(job), config, {"eval_windows": JobConfig.eval_windows})
    again, same = parse_quantize(shlex.split(line)[2:])
    assert same == config and vars(again) | {"output": "OUT"} == vars(job)
    product = nanoquant_config(2.0, method="product", product={"codebooks": (8, 8)})
    words = shlex.split(quantize_line(vars(job), product, {}))
    assert parse_quantize(words[2:])[1] == product


def test_paths_of_this_machine_are_not_told():
    job = JobConfig(
        source="/home/me/dense", output="o", text="/home/me/text.txt", eval_text="/x/t.txt"
    )
    line = quantize_line(vars(job), nanoquant_config(), {})
    assert "/home" not in line and "/x/" not in line
    assert line.startswith("nanoquant quantize dense OUT --text text.txt")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process takes for the only one."""
    with fake_hub(tmp_path / "hub", "right") as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "right")
        yield hub


def test_a_checkpoint_goes_to_a_hub_and_generates_from_there(copied, hub, capsys):
    (copied / "README.md").write_text("# of the dense model\n")
    code, out, err = call(capsys, "push", copied, "--name", "me/small")
    assert code == 0 and out.strip() == f"{hub.address}/me/small", err
    there = hub.root / "me" / "small"
    assert {f.name for f in there.iterdir()} == {f.name for f in copied.iterdir()}
    weights = "model.safetensors"
    assert (there / weights).read_bytes() == (copied / weights).read_bytes()
    card = (there / "README.md").read_text()
    assert "bits per weight" in card and card.count('from_pretrained("me/small")') == 2
    assert "# me/small\n" in card and "`nanoquant generate me/small " in card
    words = ["--prompt", "the river", "--max-new-tokens", 4]
    code, out, err = call(capsys, "generate", "me/small", *words)
    assert code == 0, err
    assert out == call(capsys, "generate", copied, *words)[1] != ""


def test_a_hub_that_refuses_is_told_with_what_to_do(copied, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "hf auth login" in refused(capsys, "push", copied, "--name", "me/small")


def test_a_model_that_a_hub_does_not_give_is_told_with_what_to_do(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for name, words in (
        ("me/none", "no model of that name, or it is private"),
        ("private/one", "log in with hf auth login or set HF_TOKEN"),
        ("gated/one", "ask on its page there"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' is not a folder here.*{words}"):
            resolve_folder(name)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    with pytest.raises(ValueError, match="can't be reached.*HF_ENDPOINT"):
        resolve_folder("me/none")


AUTO = """
import sys, torch, nanoquant
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("me/auto")
again = AutoModelForCausalLM.from_pretrained("me/auto")
ids = torch.arange(3, 9)[None]
print(torch.equal(model(ids).logits, again(ids).logits), type(again.model.layers[0].mlp.up_proj).__name__)
"""


def test_transformers_itself_pushes_and_loads_by_name(copied, hub, tmp_path):
    """In a process that knows the hub as users tell it."""
    known = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "right", "HF_HOME": str(tmp_path / "home")}
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | known
    done = subprocess.run(
        [sys.executable, "-c", AUTO, copied],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "PackedBinaryLinear"], done.stderr


def test_an_upload_that_reaches_no_hub_says_so(copied, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    with pytest.raises(OSError, match="me/small could not be uploaded.*look at the connection"):
        push(copied, "me/small")


@pytest.mark.parametrize("name", ["small one", "a/b/c", "-a/b", "small"])
def test_names_that_no_hub_has_are_refused(copied, name, capsys):
    assert "no name on a hub" in refused(capsys, "push", copied, f"--name={name}")


def test_what_is_no_checkpoint_has_no_card(place, tmp_path, capsys):
    assert "dense" in refused(capsys, "card", place / "dense")
    assert "is not a folder" in refused(capsys, "card", tmp_path / "none")
