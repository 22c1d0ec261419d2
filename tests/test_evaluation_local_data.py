"""Data sets from local folders: every kind of file gives the same rows, and what is missing is named."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from nanoquant.evaluation.local_data import find_files, read_rows

ROWS = [{"text": "one\n", "label": 1}, {"text": "", "label": 0}, {"text": " two", "label": 1}]


def write_jsonl(file):
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_gz(file):
    with gzip.open(file, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_parquet(file):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


def write_arrow(file):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(file), table.schema) as out:
        out.write_table(table)


KINDS = {
    "c4-validation.00000-of-00008.json.gz": write_gz,
    "validation.jsonl": write_jsonl,
    "validation-00000-of-00001.parquet": write_parquet,
    "validation/data-00000-of-00001.arrow": write_arrow,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    file = tmp_path / "task" / name
    file.parent.mkdir(parents=True)
    KINDS[name](file)
    split, files = find_files(tmp_path, ("elsewhere", "task"), ("test", "validation"))
    assert (split, files) == ("validation", [file])
    assert list(read_rows(files, ("label", "text"), "the task")) == ROWS


def test_arrow_files_with_a_footer_are_read_too(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(tmp_path / "test.arrow"), table.schema) as out:
        out.write_table(table)
    assert list(read_rows([tmp_path / "test.arrow"], ("text", "label"), "x")) == ROWS


def test_lines_of_a_text_file_are_rows_as_the_hub_has_them(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" = Title = \n \n a\u2028b\x0bc\n", encoding="utf-8")
    rows = list(read_rows([tmp_path / "wiki.test.raw"], ("text",), "wikitext2"))
    assert rows == [{"text": " = Title = \n"}, {"text": ""}, {"text": " a\u2028b\x0bc\n"}]


def test_the_first_split_and_the_first_folder_win(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for split in ("test", "validation"):
            write_jsonl(tmp_path / folder / f"{split}.jsonl")
    split, files = find_files(tmp_path, ("one", "two"), ("test", "validation"))
    assert (split, files) == ("test", [tmp_path / "one" / "test.jsonl"])


def test_missing_columns_are_named_with_the_file(tmp_path):
    write_jsonl(tmp_path / "test.jsonl")
    with pytest.raises(
        ValueError, match=r"test.jsonl lacks the columns goal, sol1 of the task piqa"
    ):
        next(read_rows([tmp_path / "test.jsonl"], ("goal", "sol1", "text"), "the task piqa"))


def test_a_row_that_lacks_a_column_is_named_by_its_number(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"texts": "b"}\n')
    with pytest.raises(
        ValueError, match=r"test.jsonl, row 2 lacks the columns text .* found: texts"
    ):
        list(read_rows([tmp_path / "test.jsonl"], ("text",), "it"))


def test_a_folder_without_the_data_set_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no files of the split test in wikitext2, wiki;"):
        find_files(tmp_path, ("wikitext2", "wiki"), ("test",))
    with pytest.raises(ValueError, match="is not a folder"):
        find_files(tmp_path / "none", ("wiki",), ("test",))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="test.parquet can't be read"):
        list(read_rows([tmp_path / "test.parquet"], ("text",), "it"))


def test_two_kinds_of_files_of_one_split_are_refused(tmp_path):
    (tmp_path / "wiki").mkdir()
    write_jsonl(tmp_path / "wiki" / "test.jsonl")
    write_parquet(tmp_path / "wiki" / "test.parquet")
    with pytest.raises(ValueError, match=r"holds the split test as .jsonl, .parquet; keep one"):
        find_files(tmp_path, ("wiki",), ("test",))
