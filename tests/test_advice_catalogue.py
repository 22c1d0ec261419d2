"""Names find the model that is meant, and unknown ones are answered with the nearest."""

import pytest
from tiny_models import tiny_llama
from transformers import AutoConfig

from nanoquant.advice import catalogue
from nanoquant.advice.catalogue import (
    CONFIGS,
    HUB,
    LINES,
    find,
    larger_siblings,
    smaller_siblings,
)
from nanoquant.advice.commands import hub_name


@pytest.mark.parametrize(
    ("name", "published", "post_trained", "thinks"),
    [
        ("llama-2-7b", "llama-2-7b", False, False),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b", True, False),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b", True, False),
        ("Llama-3.1-8B", "llama-3.1-8b", False, False),
        ("Qwen/Qwen3-8B", "qwen3-8b", True, True),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b", False, False),
        ("qwen3-8b", "qwen3-8b", False, False),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b", True, False),
        ("Qwen/Qwen3-4B-Thinking-2507", "qwen3-4b", True, True),
        ("google/gemma-3-4b-it", "gemma-3-4b", True, False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "demo", True, False),
    ],
)
def test_a_name_is_understood_without_network(name, published, post_trained, thinks):
    found = find(name)
    assert (found.published, found.post_trained, found.thinks) == (published, post_trained, thinks)
    assert found.source == (name if "/" in name else HUB[published])


def test_a_hub_name_that_is_not_published_here_gives_its_configuration_alone(tmp_path, monkeypatch):
    tiny_llama().config.save_pretrained(tmp_path)
    asked = []

    def resolve(name, weights):
        asked.append((name, weights))
        return tmp_path

    monkeypatch.setattr(catalogue, "resolve_folder", resolve)
    found = find("somebody/tiny")
    assert asked == [("somebody/tiny", False)]
    assert (found.published, found.source, found.config.hidden_size) == (None, "somebody/tiny", 64)


def test_a_folder_with_published_shapes_is_a_version_of_that_model(tmp_path):
    AutoConfig.for_model(**CONFIGS["qwen3-4b"]).save_pretrained(tmp_path)
    assert find(str(tmp_path)).published == "qwen3-4b"
    assert not find(str(tmp_path)).post_trained
    (tmp_path / "chat_template.jinja").write_text("{% if enable_thinking %}<think>{% endif %}")
    assert find(str(tmp_path)).post_trained and find(str(tmp_path)).thinks
    assert find(str(tmp_path / "config.json")).published == "qwen3-4b"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_published_configuration_is_recognized(name, tmp_path):
    AutoConfig.for_model(**CONFIGS[name]).save_pretrained(tmp_path)
    assert find(str(tmp_path)).published == name


def test_a_quantized_folder_is_refused(tmp_path):
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "nanoquant"}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already"):
        find(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "near"), [("lama-2-7b", "near: llama-2-7b"), ("qwen-3-8b", "near: qwen3-8b")]
)
def test_unknown_names_are_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"there is no model '{name}'.*{near}.*on the Hugging"):
        find(name)


def test_siblings_are_of_the_same_family_and_in_order_of_size():
    assert smaller_siblings("llama-2-70b") == ("llama-2-13b", "llama-2-7b")
    assert larger_siblings("qwen3-8b") == ("qwen3-14b", "qwen3-32b")
    assert smaller_siblings("demo") == smaller_siblings(None) == larger_siblings(None) == ()
    for line in LINES:
        assert len({CONFIGS[name]["vocab_size"] // 1000 for name in line}) == 1
    assert {name for line in LINES for name in line} == CONFIGS.keys() == HUB.keys()


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("llama-2-7b", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct"),
        ("qwen3-4b", "Qwen/Qwen3-4B"),
        ("gemma-3-1b", "google/gemma-3-1b-it"),
        ("demo", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_siblings_of_post_trained_models_are_post_trained(published, name):
    assert hub_name(published, post_trained=True) == name
    assert find(name).published == published and find(name).post_trained
