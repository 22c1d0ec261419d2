"""Frozen protocols: which text, which windows, which BOS; and what they refuse."""

import dataclasses
import json

import pytest
import torch
from tiny_models import tiny_tokenizer

from nanoquant.data import DataConfig
from nanoquant.evaluation import protocols
from nanoquant.evaluation.protocols import PROTOCOLS, fingerprint, prepare, prepare_text

WORDS = "the river runs over stone and light falls on an old town "


def write_rows(folder, name, rows):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with as many rows as the protocols have."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, "wikitext2/test.jsonl", [f" {WORDS[: i % 40]}\n" for i in range(4358)])
    write_rows(folder, "c4/en/c4-validation.jsonl", [f"{i} {WORDS * 9}" for i in range(1105)])
    return folder


def ids(tokenizer, text):
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_protocols_are_frozen():
    """Published figures depend on these; a change needs a new version."""
    common = {"version": 1, "length": 2048}
    assert PROTOCOLS["wikitext2"].settings() == common | {
        "source": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "files": None,
        "split": "test",
        "rows": 4358,
        "whole": True,
        "join": "\n\n",
        "windows": None,
    }
    assert PROTOCOLS["c4"].settings() == common | {
        "source": "allenai/c4",
        "config": None,
        "files": "en/c4-validation.00000-of-00008.json.gz",
        "split": "validation",
        "rows": 1100,
        "whole": False,
        "join": " ",
        "windows": 256,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOLS["c4"].length = 512


def test_wikitext2_is_all_rows_joined_by_blank_lines_without_the_tail(data):
    tokenizer = tiny_tokenizer()
    found = prepare("wikitext2", None, tokenizer, "llama", str(data))
    text = "\n\n".join(f" {WORDS[: i % 40]}\n" for i in range(4358))
    whole = ids(tokenizer, text)
    count = len(whole) // 2048
    assert torch.equal(found.windows, whole[: count * 2048].view(count, 2048))
    assert found.settings["windows"] == count and len(whole) % 2048


def test_c4_is_1100_documents_and_at_most_256_windows(data):
    tokenizer = tiny_tokenizer()
    found = prepare("c4", None, tokenizer, "llama", str(data))
    whole = ids(tokenizer, " ".join(f"{i} {WORDS * 9}" for i in range(1100)))
    assert len(whole) > 256 * 2048 and found.windows.shape == (256, 2048)
    assert torch.equal(found.windows.flatten(), whole[: 256 * 2048])


def test_gemma_gets_bos_in_every_window_and_llama_once_where_its_tokenizer_adds_it(data):
    tokenizer = tiny_tokenizer(add_bos=True)
    bos = tokenizer.bos_token_id
    gemma = prepare("wikitext2", None, tokenizer, "gemma3_text", str(data))
    llama = prepare("wikitext2", None, tokenizer, "llama", str(data))
    assert (gemma.windows[:, 0] == bos).all() and (gemma.windows[:, 1:] != bos).all()
    assert (llama.windows == bos).sum() == 1 and llama.windows[0, 0] == bos
    assert torch.equal(gemma.windows[0], llama.windows[0])  # the shift begins with window 2
    assert torch.equal(gemma.windows[1, 1], llama.windows[1, 0])
    assert [x.settings["bos_each_window"] for x in (gemma, llama)] == [True, False]


def test_the_flag_overrules_the_family(data):
    tokenizer = tiny_tokenizer(add_bos=True)
    forced = prepare("wikitext2", True, tokenizer, "llama", str(data))
    off = prepare("wikitext2", False, tokenizer, "gemma2", str(data))
    assert (forced.windows[:, 0] == tokenizer.bos_token_id).all()
    assert (off.windows == tokenizer.bos_token_id).sum() == 1
    bare = tiny_tokenizer()
    bare.bos_token = None
    with pytest.raises(ValueError, match="has no BOS token"):
        prepare("wikitext2", True, bare, "llama", str(data))


def test_a_local_text_keeps_its_rule_of_the_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 20)
    request = DataConfig(text=str(tmp_path / "text.txt"), windows=3, length=16)
    for add_bos in (False, True):
        tokenizer = tiny_tokenizer(add_bos=add_bos)
        windows = prepare_text(request, None, tokenizer).windows
        assert ((windows[:, 0] == tokenizer.bos_token_id) == add_bos).all()
    assert (prepare_text(request, False, tokenizer).windows != tokenizer.bos_token_id).all()


def test_a_text_shorter_than_a_window_is_refused_with_both_lengths(tmp_path):
    (tmp_path / "short.txt").write_text("the river")
    request = DataConfig(text=str(tmp_path / "short.txt"), windows=1, length=512)
    with pytest.raises(ValueError, match=r"has 9 tokens, but 1 windows of 512 tokens need 512"):
        prepare_text(request, None, tiny_tokenizer())


def test_a_data_set_of_another_size_is_refused(tmp_path):
    write_rows(tmp_path, "wikitext2/test.jsonl", ["a"] * 12)
    write_rows(tmp_path, "c4/validation.jsonl", ["a"] * 12)
    with pytest.raises(ValueError, match=r"wikitext2 reads 4358 rows .* holds 12;"):
        prepare("wikitext2", None, tiny_tokenizer(), "llama", str(tmp_path))
    with pytest.raises(ValueError, match=r"c4 reads 1100 rows .* holds 12;"):
        prepare("c4", None, tiny_tokenizer(), "llama", str(tmp_path))
    write_rows(tmp_path, "wikitext2/test.jsonl", ["a"] * 4400)
    with pytest.raises(ValueError, match="holds more than 4358"):
        prepare("wikitext2", None, tiny_tokenizer(), "llama", str(tmp_path))


def test_the_hub_is_asked_for_exactly_the_data_set(data, monkeypatch):
    asked = []

    def load_dataset(name, config, **settings):
        asked.append((name, config, settings))
        return ({"text": f" {WORDS[: i % 40]}\n"} for i in range(4358))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = prepare("wikitext2", None, tiny_tokenizer(), "llama")
    local = prepare("wikitext2", None, tiny_tokenizer(), "llama", str(data))
    assert torch.equal(found.windows, local.windows)
    assert found.settings["text_sha256"] == local.settings["text_sha256"]
    settings = {"data_files": None, "split": "test", "streaming": True}
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", settings)]


def test_without_network_the_way_out_is_named(monkeypatch):
    def load_dataset(*names, **settings):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"no route. Without network give --data DIR .* DIR/c4"):
        prepare("c4", None, tiny_tokenizer(), "llama")


def test_fingerprints_tell_tokenizers_apart():
    one, same, bos = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer(add_bos=True)
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one)["sha256"] != fingerprint(bos)["sha256"]
    one.add_tokens(["river"])
    assert fingerprint(one)["sha256"] != fingerprint(same)["sha256"]


def test_every_word_of_a_family_is_lower_case_as_model_types_are():
    assert all(word == word.lower() for word in protocols.BOS_FAMILIES)
