"""Several texts, each with its share of windows."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer

from nanoquant.mixture import Source, apportion, interleave, read_sources

READ = Source("read", torch.arange(3))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "c=2"):
        (tmp_path / name).write_text("abc" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_may_carry_a_weight(folder):
    sources = read_sources(["a.txt=3", "b.txt=0.5", "self=1"], tiny_tokenizer())
    assert [(s.name, s.weight) for s in sources] == [("a.txt", 3.0), ("b.txt", 0.5), ("self", 1.0)]
    assert len(sources[0].tokens) == 30 and sources[2].tokens is None
    assert read_sources(sources, None) is not None


def test_a_file_whose_name_looks_like_a_weight_is_a_file(folder):
    assert read_sources(folder / "c=2", tiny_tokenizer())[0].weight is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "list of texts is empty"),
        (["a.txt", "b.txt=2"], "a.txt has no weight; give all texts one"),
        (["a.txt", "self"], "a.txt, self has no weight.*no size of its own"),
        (["a.txt", "./a.txt"], "a.txt comes twice"),
        (["a.txt", "sub/../a.txt"], "a.txt comes twice"),
        (["a.txt=1", "link.txt=1"], "a.txt comes twice"),
        (["self=1", "self=2"], "self comes twice"),
        ("a.txt=0", "a.txt: a weight must be above 0, as in train.txt=2, got 0"),
        ("a.txt=-1", "a weight must be above 0"),
        ("a.txt=nan", "a weight must be above 0"),
        ("=2", "=2 has a weight and no text"),
        ([READ, "a.txt"], "names or Sources, not both, got Source, str"),
        ([torch.arange(3), torch.arange(3)], "got Tensor, Tensor"),
        ([READ, Source("b", torch.arange(3), 1.0)], "read has no weight; give all texts one"),
        ([READ, Source("self", None)], "read, self has no weight"),
        ("d.txt=2", "found no file d.txt; near names there: "),
        ("d=e.txt", "found no file d=e.txt"),
        ("~no-such-user/a.txt", "~no-such-user/a.txt: found no home folder for ~no-such-user"),
        (["~no-such-user/a.txt=2", "self=1"], "found no home folder for ~no-such-user"),
    ],
)
def test_mixtures_that_cannot_be_read_say_why(folder, data, message):
    with pytest.raises(ValueError, match=message):
        read_sources(data, tiny_tokenizer())


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf")])
def test_a_source_checks_its_own_weight(weight):
    with pytest.raises(ValueError, match="a: a weight must be above 0"):
        Source("a", torch.arange(3), weight)


def test_a_path_named_self_is_a_file(folder):
    with pytest.raises(ValueError, match="found no file self"):
        read_sources(Path("self"), tiny_tokenizer())


def test_sources_that_are_read_are_given_back():
    sources = [Source("a", torch.arange(3), 1.0), Source("self", None, 2.0)]
    assert read_sources(sources, None) == sources


@pytest.mark.parametrize("count", [0, 1, 7, 416, 1001])
@pytest.mark.parametrize("weights", [[1], [3, 1], [0.5, 0.25, 0.25], [1, 1, 1], [7, 2, 1, 90]])
def test_shares_are_whole_and_off_by_less_than_one(count, weights):
    parts = apportion(count, weights)
    assert sum(parts) == count
    exact = [count * weight / sum(weights) for weight in weights]
    assert all(abs(part - value) < 1 for part, value in zip(parts, exact, strict=True))


@pytest.mark.parametrize("counts", [[5], [9, 3], [100, 10, 1], [4, 0, 4]])
def test_every_beginning_is_mixed_like_the_whole(counts):
    turns = interleave(counts)
    assert [turns.count(source) for source in range(len(counts))] == counts
    for end in range(len(turns)):
        for source, count in enumerate(counts):
            assert abs(turns[:end].count(source) - end * count / len(turns)) <= 1.5
