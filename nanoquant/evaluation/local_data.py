"""Data sets from a local folder: finds the files of a split and reads the columns that are needed.

A folder may hold data sets as folders of parquet, arrow, JSONL (also as .gz) or text files; the name of the
split stands in the name of a file or of the folder around it, as on the Hub and after ``save_to_disk``.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanoquant.data import local_path
from nanoquant.json_files import parse_json

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".raw")


def find_files(
    data: str | Path, folders: Sequence[str], splits: Sequence[str]
) -> tuple[str, list[Path]]:
    """The files of the first split that is there.

    Args:
        data: the folder given.
        folders: where in it the data set may lie, best first.
        splits: names of splits, best first.

    Returns:
        The name of the split, and its files in the order of their names.

    Raises:
        ValueError: none is there; tells where it was looked for.
    """
    root = local_path(data)
    if not root.is_dir():
        raise ValueError(f"--data {data} is not a folder")
    for split in splits:
        for folder in folders:
            files = [
                path for path in _files(root / folder) if _of_split(path, root / folder, split)
            ]
            kinds = {_suffix(path) for path in files}
            if len(kinds) > 1:
                raise ValueError(
                    f"{root / folder} holds the split {split} as {', '.join(sorted(map(str, kinds)))}; keep one"
                )
            if files:
                return split, files
    raise ValueError(
        f"--data {data} holds no files of the split {' or '.join(splits)} in {', '.join(folders)}; "
        f"files end in {', '.join(SUFFIXES)}, and the split's name is in theirs or their folder's"
    )


def read_rows(files: Sequence[Path], columns: Sequence[str], what: str) -> Iterator[dict[str, Any]]:
    """The rows of files, with the columns that are needed and no others.

    Raises:
        ValueError: a file can't be read or lacks columns; names both.
    """
    for file in files:
        try:
            rows = _READERS[str(_suffix(file))](file)
        except Exception as error:  # pyarrow and json have families of their own
            raise ValueError(f"{file} can't be read: {error}") from error
        found: set[str] = set().union(*(row.keys() for row in rows[:1])) if rows else set()
        _check_columns(file, found, columns, what)
        for number, row in enumerate(rows, start=1):
            if not row.keys() >= set(columns):
                _check_columns(f"{file}, row {number}", row.keys(), columns, what)
            yield {name: row[name] for name in columns}


def _check_columns(where: Any, found: Any, columns: Sequence[str], what: str) -> None:  # noqa: ANN401
    lacking = [name for name in columns if name not in found]
    if lacking:
        raise ValueError(
            f"{where} lacks the columns {', '.join(lacking)} of {what}; "
            f"found: {', '.join(sorted(found)) or 'nothing'}"
        )


def _files(folder: Path) -> list[Path]:
    """Data files in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path))


def _suffix(path: Path) -> str | None:
    return next((end for end in sorted(SUFFIXES, key=len) if path.name.endswith(end)), None)


def _of_split(path: Path, folder: Path, split: str) -> bool:
    """Whether the name of the split is a word of the file's name or of a folder under ``folder``."""
    words = re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())
    return split in words


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """A text file as the Hub has it: a row for a line, its end kept, blank lines empty."""
    with file.open(encoding="utf-8") as lines:
        return [{"text": line if line.strip() else ""} for line in lines]


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        return [parse_json(line) for line in lines if line.strip()]


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return parquet.read_table(file).to_pylist()


def _read_arrow(file: Path) -> list[dict[str, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        footer = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = (pyarrow.ipc.open_file if footer else pyarrow.ipc.open_stream)(source)
        return reader.read_all().to_pylist()


_READERS = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_jsonl,
    ".txt": _read_lines,
    ".raw": _read_lines,
}
