"""The command advise as a user meets it: text, JSON, commands that work, and refused input."""

import json
import shlex

import pytest
import torch
from command_line import call, refused
from tiny_models import build, tiny_tokenizer
from transformers import LlamaConfig

from nanoquant.advice import config as advice_config
from nanoquant.advice.anatomy import anatomy
from nanoquant.advice.commands import command_for, python_for
from nanoquant.advice.options import OTHERS, OURS, weight_bytes
from nanoquant.parsers import parse_quantize
from nanoquant.sizes import tensor_bytes
from nanoquant.units import parse_bytes

pytestmark = pytest.mark.usefixtures("untouched_process")


@pytest.fixture
def tiny(tmp_path):
    """Folder of a dense model that no published one has the shapes of."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 128}
    model = build(LlamaConfig(**sizes, tie_word_embeddings=False), torch.bfloat16)
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def advised(capsys, tmp_path, *arguments):
    code, out, err = call(capsys, "advise", *arguments, "--json", tmp_path / "advice.json")
    assert (code, err) == (0, "")
    return out, json.loads((tmp_path / "advice.json").read_text())


def test_text_and_json_say_the_same(capsys, tmp_path):
    flags = "--memory 8GB --context 4096 --device cuda".split()
    out, figures = advised(capsys, tmp_path, "llama-2-70b", *flags)
    assert figures["recommended"]["model"] == "llama-2-7b"
    assert f"Recommended: llama-2-7b as {figures['recommended']['option']}" in out
    assert figures["recommended"]["command"] in out and figures["model_itself"]["command"] in out
    for row in figures["options"]:
        assert row["total"] == row["weights"] + row["cache"] + row["activations"]
        (line,) = [x for x in out.splitlines() if x.startswith(f"{row['option']}  ")]
        assert f" {row['total'] / 1e9:.3f} " in line and f" {row['fits']} " in line
        assert ("unknown" in line) or len(row["quality"]) == 2
        for figure in [] if row["quality"] == "unknown" else row["quality"]:
            assert figure["kind"] in ("published", "measured") and figure["source"]["citation"]
    assert {"task": "chat", "context": 4096, "memory": 8 * 10**9, "device": "cuda"}.items() <= (
        figures.items()
    )


def test_every_number_of_quality_in_the_table_has_its_source_below(capsys, tmp_path):
    out, _ = advised(capsys, tmp_path, "qwen3-8b", "--memory", "24GB", "--device", "cuda")
    table, rest = out.split("\n\n")[1:3]
    for number in range(1, 8):
        assert f"[{number}]" in table and f"\n[{number}] arXiv" in rest
    assert "9.72 by AWQ*, published [3]" in table and "*: of another protocol" in " ".join(
        rest.split()
    )
    assert "unknown" in table


def test_measured_figures_are_marked_as_such(capsys, tmp_path):
    out, _ = advised(capsys, tmp_path, "demo", "--memory", "100MB", "--context", 512)
    assert "59.4 by preset best, measured [1]" in out and "[1] README of this project" in out
    assert "Sizes in MB" in out


def test_a_folder_of_an_unknown_family_is_advised_by_its_shapes(tiny, capsys, tmp_path):
    out, figures = advised(capsys, tmp_path, tiny, "--memory", "600kB", "--context", 16)
    assert "Its family is not in the table of this command" in out
    assert figures["published"] is None and figures["options"][0]["quality"] == "unknown"


def test_without_memory_this_machine_is_asked(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(advice_config.os, "sysconf", lambda name: 4096 if "SIZE" in name else 10**6)
    out, _ = advised(capsys, tmp_path, "demo", "--device", "cpu")
    assert "chat in 4.10 GB on cpu" in out


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8_000_000_000),
        ("7.5GiB", 8_053_063_680),
        ("8000MB", 8_000_000_000),
        ("512 mib", 536_870_912),
        (".5gb", 500_000_000),
        ("1TB", 10**12),
    ],
)
def test_memory_is_read_with_its_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama-9-7b"], "there is no model 'llama-9-7b' (near: llama-"),
        (["demo", "--memory", "8"], "memory must be a number above 0 with a unit"),
        (["demo", "--memory", "8XB"], "such as 8GB (10^9 bytes each) or 7.5GiB"),
        (["demo", "--memory=-8GB"], "got '-8GB'"),
        (["demo", "--memory", "0GB"], "got '0GB'"),
        (["demo", "--memory", "inf GB"], "got 'inf GB'"),
        (["llama-2-7b", "--memory", "8GB", "--context", "5000"], "beyond the 4096 positions of llama"),
        (["demo", "--memory", "8GB", "--context", "0"], "context must be at least 1, got 0"),
        (["demo", "--memory", "8GB", "--batch", "0"], "batch must be at least 1, got 0"),
        (["demo", "--memory", "8GB", "--task", "maths"], "got 'maths' (near: math)"),
        (["demo", "--memory", "8GB", "--task", "poetry"], "task must be one of chat, math, code, long"),
        (["demo", "--memory", "8GB", "--device", "tpu"], "device must be one of auto, cpu, cuda, gpu"),
        (["demo", "--memory", "8GB", "--cache-bits", "3"], "cache_bits must be 16, 8 or 4, got 3"),
        (["demo", "--memory", "8GB", "--json", "/nowhere/a.json"], "there is no folder /nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_says_what_to_do(arguments, words, capsys):
    assert words in refused(capsys, "advise", *arguments)


def test_a_gpu_that_is_not_here_needs_its_memory_named(capsys):
    if not torch.cuda.is_available():
        line = refused(capsys, "advise", "demo", "--device", "cuda")
        assert "this machine has no GPU to ask; say --memory" in line


@pytest.mark.parametrize("option", OURS, ids=lambda option: option.name)
def test_commands_of_this_library_parse_and_mean_the_option(option):
    command = shlex.split(command_for(option, "MODEL", None, "cpu"))
    assert command[:2] == ["nanoquant", "quantize"]
    job, config = parse_quantize(command[2:])
    assert (job.source, config.budget.bits) == ("MODEL", option.bits)
    assert (config.embedding.bits, config.preset) == (option.embedding, "best")
    assert config.method == option.method


@pytest.mark.parametrize("option", OTHERS, ids=lambda option: option.key)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_of_others_are_python_that_compiles(option, device):
    source = "owner/it's"
    command = shlex.split(command_for(option, source, "llama-2-7b", device))
    assert command[:2] == ["python", "-c"] and len(command) == 3
    compile(command[2], "command", "exec")
    assert ("AQLM" in command[2]) == (option.tool == "aqlm") or source in command[2]


@pytest.mark.parametrize("key", ["bf16", "int8", "int4-g64"])
def test_commands_of_others_give_the_bytes_that_the_table_says(key, tiny):
    option = next(option for option in OTHERS if option.key == key)
    values = {}
    exec(python_for(option, str(tiny), None, "cpu"), values)  # the text of our own command
    model = values["model"]
    assert tensor_bytes(model.parameters()) == weight_bytes(anatomy(model.config), option, "cpu")
