import json
import sys
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_tokenizer

from nanoquant import data
from nanoquant.config import nanoquant_config
from nanoquant.data import DataConfig, bos_of, load_tokens, make_windows
from nanoquant.text_plan import plan_text


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file_is_tokenized_whole_as_it_is(tmp_path, tokenizer, caplog, capsys):
    text = "One line.\n\nAnother, after a blank one.\n" * 20
    tokens = load_tokens(str(write(tmp_path / "a.txt", text)), tokenizer)
    assert tokens.dtype == torch.int64 and tokens.ndim == 1
    assert tokenizer.decode(tokens) == text
    assert "sequence length" not in caplog.text + capsys.readouterr().err


def test_no_special_token_is_added_to_a_text(tmp_path):
    tokens = load_tokens(write(tmp_path / "a.txt", "abc"), tiny_tokenizer(add_bos=True))
    assert len(tokens) == 3


def test_jsonl_documents_are_joined_by_a_blank_line(tmp_path, tokenizer):
    lines = [json.dumps({"text": text, "id": 1}) for text in ("first", "second")]
    tokens = load_tokens(write(tmp_path / "a.jsonl", "\n\n".join(lines) + "\n"), tokenizer)
    assert tokenizer.decode(tokens) == "first\n\nsecond"


def test_jsonl_lines_end_at_newlines_only(tmp_path, tokenizer):
    document = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    path = tmp_path / "a.jsonl"
    path.write_text(document + "\r\n" + document + "\n", encoding="utf-8", newline="")
    tokens = load_tokens(path, tokenizer)
    assert tokenizer.decode(tokens) == "\n\n".join(["one<unk>two<unk>three"] * 2)


def test_long_sources_stop_at_a_document_and_say_so(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(data, "LEAST_CHARACTERS", 12)
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n{"text": "second"}\n{"text": "third"}\n')
    assert tokenizer.decode(load_tokens(path, tokenizer)) == "first"
    assert "only the first 1 documents" in caplog.text
    caplog.clear()
    assert tokenizer.decode(load_tokens(path, tokenizer, wanted=9)) == "first\n\nsecond\n\nthird"
    assert not caplog.text


def test_lines_behind_the_last_document_are_not_looked_at(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "LEAST_CHARACTERS", 12)
    path = write(tmp_path / "a.jsonl", b'{"text": "first"}\n{"text": "second"}\n\xff\0\n')
    assert tokenizer.decode(load_tokens(path, tokenizer)) == "first"
    with pytest.raises(ValueError, match=r"not UTF-8 text \(.*byte 37\)"):
        load_tokens(path, tokenizer, wanted=9)


def test_a_long_jsonl_file_takes_memory_only_for_what_is_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "LEAST_CHARACTERS", 12)
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n' * 500_000)
    tracemalloc.start()
    try:
        load_tokens(path, tokenizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 5


def test_the_preset_with_the_most_text_reads_a_long_source_as_far_as_it_needs(monkeypatch):
    read = []
    monkeypatch.setattr(data, "_is_dataset_name", lambda _: True)
    monkeypatch.setattr(data, "_read_dataset", lambda *_: iter([("word", "")]))
    monkeypatch.setattr(data, "_join", lambda documents, most: read.append(most) or "word")
    with pytest.raises(ValueError, match="needed are 33570816"):
        plan_text("corpus:train", tiny_tokenizer(), nanoquant_config(preset="long"))
    assert read == [8 * 33570816]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_files_give_their_ids(tmp_path, tokenizer, dtype):
    ids = torch.arange(24).to(dtype)
    torch.save(ids, tmp_path / "a.pt")
    torch.save({"ids": ids.view(4, 6)}, tmp_path / "b.pt")
    save_file({"ids": ids}, tmp_path / "a.safetensors")
    for source in (tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "a.safetensors", ids):
        assert torch.equal(load_tokens(source, tokenizer), torch.arange(24))
        assert torch.equal(load_tokens(source, None), torch.arange(24))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n\n ", "is empty"),
        ("nul.txt", b"abc\0def", "binary file"),
        ("latin.txt", b"caf\xe9 au lait", r"not UTF-8 text \(.*byte 3"),
        ("empty.jsonl", "\n", "is empty"),
        ("list.jsonl", "[1, 2]\n", 'line 1 has no string under "text".*; found: list'),
        ("key.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"line 2 has no string.*\['body'\]"),
        ("nul.jsonl", b'{"text": "a"}\n{"text": "\0"}\n', "binary file"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"not UTF-8 text \(.*byte 24\)"),
        ("cut.jsonl", b'{"text": "\xe2\x82', r"\(unexpected end of data, byte 10\)"),
        ("mark.jsonl", '\ufeff{"text": "a"}\n', "line 1 is not JSON: Unexpected UTF-8 BOM"),
        ("place.jsonl", '{"text": \n', "line 1 is not JSON: Expecting value: line 1 column 10"),
        ("broken.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("broken.pt", b"no tensor", "or is no file of torch.save"),
        ("broken.safetensors", b"no tensor", "no readable tensor file"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:-3] else "",
)
def test_files_that_cannot_be_used_say_why(tmp_path, tokenizer, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_tokens(write(tmp_path / name, content), tokenizer)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4), "dtype torch.float32; token ids are integers"),
        (torch.zeros(0, dtype=torch.long), "is empty"),
        (torch.tensor([1, 5000]), "holds ids 1 to 5000; the tokenizer has 0 to 99"),
        (torch.tensor([-1, 5]), "holds ids -1 to 5"),
    ],
    ids=["float", "empty", "too large", "negative"],
)
def test_tensors_that_are_no_token_ids_say_why(tokenizer, tensor, message):
    with pytest.raises(ValueError, match=message):
        load_tokens(tensor, tokenizer)


def test_several_tensors_in_a_file_are_refused(tmp_path, tokenizer):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="exactly one tensor of token ids; found 2"):
        load_tokens(tmp_path / "a.safetensors", tokenizer)


def test_pickled_code_in_a_token_file_is_refused(tmp_path, tokenizer):
    torch.save(print, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds pickled code.*GLOBAL print"):
        load_tokens(tmp_path / "a.pt", tokenizer)


def test_a_missing_file_names_its_neighbours(tmp_path, tokenizer):
    write(tmp_path / "wiki_train.txt", "abc")
    with pytest.raises(ValueError, match="near names there: wiki_train.txt"):
        load_tokens(tmp_path / "wiki_trian.txt", tokenizer)
    with pytest.raises(ValueError, match="name:config:split"):
        load_tokens("wikitext", tokenizer)
    with pytest.raises(ValueError, match="found no file a:b.jsonl"):
        load_tokens("a:b.jsonl", tokenizer)
    with pytest.raises(ValueError, match="is a folder"):
        load_tokens(tmp_path, tokenizer)


def test_an_unknown_home_folder_is_named(tokenizer):
    message = "^~no-such-user/a.txt: found no home folder for ~no-such-user; give the full path$"
    with pytest.raises(ValueError, match=message):
        load_tokens("~no-such-user/a.txt", tokenizer)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load_tokens(write(tmp_path / "a.txt", "abc"), None)


def fake_datasets(monkeypatch, load):
    module = type(sys)("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_data_set_name_gives_its_texts(monkeypatch, tokenizer):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"text": "first"}, {"text": "second"}]

    fake_datasets(monkeypatch, load)
    tokens = load_tokens("wikitext:wikitext-2-raw-v1:train", tokenizer)
    assert tokenizer.decode(tokens) == "first\n\nsecond"
    load_tokens("some/corpus:test", tokenizer)
    load_tokens("wikimedia/wikipedia:20231101.en:train", tokenizer)
    assert asked[0] == (("wikitext", "wikitext-2-raw-v1"), {"split": "train", "streaming": True})
    assert asked[1] == (("some/corpus",), {"split": "test", "streaming": True})
    assert asked[2][0] == ("wikimedia/wikipedia", "20231101.en")


def test_a_data_set_out_of_reach_says_what_to_do(monkeypatch, tokenizer):
    def load(*args, **kwargs):
        raise ConnectionError("no route")

    fake_datasets(monkeypatch, load)
    message = "could not read the data set a:b: ConnectionError: no route.*local text file"
    with pytest.raises(ValueError, match=message):
        load_tokens("a:b", tokenizer)
    fake_datasets(monkeypatch, lambda *args, **kwargs: [{"body": "x"}])
    with pytest.raises(ValueError, match=r'^a:b, row 1 has no string under "text".*\[\'body\'\]$'):
        load_tokens("a:b", tokenizer)


def test_a_missing_datasets_library_says_how_to_install_it(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_tokens("a:b:c", tokenizer)


def test_windows_are_distinct_and_in_order():
    windows = make_windows(torch.arange(35), 10)
    assert torch.equal(windows, torch.arange(30).view(3, 10))
    assert torch.equal(make_windows(torch.arange(35), 10, count=2), torch.arange(20).view(2, 10))


def test_a_seed_chooses_windows_reproducibly():
    tokens = torch.arange(1000)
    one, same = (make_windows(tokens, 10, count=20, seed=1) for _ in range(2))
    other = make_windows(tokens, 10, count=20, seed=2)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.unique().numel() == 200 and (one[:, 0] % 10 == 0).all()


def test_bos_starts_every_window_within_its_length():
    windows = make_windows(torch.arange(2, 30), 10, bos_token_id=1)
    assert windows.shape == (3, 10) and (windows[:, 0] == 1).all()
    assert torch.equal(windows[:, 1:], torch.arange(2, 29).view(3, 9))


def test_bos_is_used_where_the_tokenizer_adds_it():
    assert bos_of(tiny_tokenizer(add_bos=True)) == 1
    assert bos_of(tiny_tokenizer(add_bos=False)) is None


def test_short_text_says_how_many_tokens_there_are_and_are_needed():
    with pytest.raises(ValueError, match="has 35 tokens, but 4 windows of 10 tokens need 40.*at m"):
        make_windows(torch.arange(35), 10, count=4)
    with pytest.raises(
        ValueError, match="has 5 tokens, but 1 windows of 10 tokens need 10.*shorter windows"
    ):
        make_windows(torch.arange(5), 10)


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="window length is 1"):
        make_windows(torch.arange(5), 1)
    with pytest.raises(ValueError, match="number of windows is 0"):
        DataConfig(text="a.txt", windows=0)


def test_lines_of_json_are_known_by_any_spelling_and_one_value_is_refused(tmp_path, tokenizer):
    lines = '{"text": "the river"}\n{"text": "runs"}\n'
    first = load_tokens(write(tmp_path / "a.jsonl", lines), tokenizer)
    for name in ("A.JSONL", "a.ndjson"):
        assert torch.equal(load_tokens(write(tmp_path / name, lines), tokenizer), first)
    with pytest.raises(ValueError, match="is one JSON value; write a text or one object a line"):
        load_tokens(write(tmp_path / "a.json", '{"text": "the river"}'), tokenizer)
