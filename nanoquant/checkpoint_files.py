"""Files of a checkpoint folder: finding, and the checks that need no model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nanoquant.json_files import flat, parse_json, read_text
from nanoquant.stored_tensors import StoredTensor, read_header

QUANT_METHOD = "nanoquant"
FORMAT_VERSION = 3
"""The newest; 2 adds quantized embeddings and heads, 3 codebooks; a checkpoint has the lowest that it needs."""
CHECKPOINT_KEY = "nanoquant_checkpoint"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
COUNTS = re.compile(r"^(n|num)_(\w+_)?layers?$|_layers$|^num_labels$")
"""Names in ``config.json`` of what transformers makes as many objects of as they say."""
MOST_COUNT = 1000
"""What they may say whatever the checkpoint holds."""
WEIGHT_SUFFIXES = (
    ".safetensors .bin .pt .pth .ckpt .pkl .pickle .gguf .ggml .h5 .msgpack .onnx .onnx_data .ot "
    ".npz .tflite .mlmodel"
).split()


def read_headers(files: list[Path], checkpoint_id: str | None) -> dict[str, StoredTensor]:
    """All tensors of the shards of one checkpoint.

    The id ties shards together and to their ``config.json``. It does not verify content: no hash is
    taken while reading, so a changed byte within the data of a tensor goes unnoticed.

    Args:
        files: the shards.
        checkpoint_id: the id in ``config.json``; None, for a configuration without one, accepts any.

    Raises:
        ValueError: as :func:`read_header`; or a shard carries another checkpoint's id, or none
            though there is one to match; or two hold one tensor.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        tensors, metadata = read_header(file)
        found = metadata.get(CHECKPOINT_KEY)
        if checkpoint_id is not None and found != checkpoint_id:
            raise ValueError(
                f"{file} belongs to another checkpoint: its id is {found or 'missing'}, but "
                f"config.json says {checkpoint_id}"
            )
        for name in tensors.keys() & stored.keys():
            raise ValueError(f"tensor {name} is in both {stored[name].file.name} and {file.name}")
        stored |= tensors
    return stored


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object, or ValueError naming the file."""
    try:
        content = parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def check_format(quantization_config: object, where: str) -> None:
    """Raise ValueError unless this is a nanoquant configuration of a format that is known here."""
    known = isinstance(quantization_config, dict)
    method = quantization_config.get("quant_method") if known else None
    if method is None:
        raise ValueError(
            f"{where} is not a nanoquant checkpoint: its config.json has no quantization_config; nanoquant quantize "
            "makes one of a dense model"
        )
    check_method(method, where)
    version = quantization_config.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(
            f"{where} has format_version {version!r}; it must be a whole number from 1"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where} has format_version {version}, but this nanoquant reads up to "
            f"{FORMAT_VERSION}; upgrade nanoquant"
        )
    for field in ("modules", "recipe"):
        if not isinstance(quantization_config.get(field), dict):
            raise ValueError(
                f"{where} has no {field}: an object of that name must be in its config.json"
            )
    for name, entry in quantization_config["modules"].items():
        if not (isinstance(entry, dict) and (_has_rank(entry) or _has_codebooks(entry))):
            raise ValueError(
                f"{where} lists {name} with {entry!r}; it needs a rank >= 1, or group, widths and slabs of codebooks"
            )
    if not isinstance(quantization_config.get("tables", {}), dict):
        raise ValueError(f"{where} has tables that are no object in its config.json")


def check_method(method: object, where: str) -> None:
    """Raise ValueError if a folder is of another quantization method."""
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"{where} is not a nanoquant checkpoint: its config.json has quant_method {method!r}; load it with the "
            "library of that method, or give the dense model it was made of"
        )


def _has_rank(entry: dict[str, Any]) -> bool:
    return type(rank := entry.get("rank")) is int and rank >= 1


def _has_codebooks(entry: dict[str, Any]) -> bool:
    widths = entry.get("widths")
    if not isinstance(widths, list | tuple):  # JSON gives a list
        return False
    numbers = (entry.get("group"), entry.get("slabs"), *widths)
    return all(type(n) is int and n >= 1 for n in numbers)


def lowest_version(tables: dict[str, Any] | None, modules: dict[str, Any]) -> int:
    """Version of the stored layout that a checkpoint needs."""
    if any(isinstance(entry, dict) and "group" in entry for entry in modules.values()):
        return 3
    return 2 if tables else 1


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder: the single file, or those of the index, checked against it.

    Raises:
        ValueError: no weights; a shard is missing, lies outside the folder, or holds other tensors
            than the index says.
    """
    if not (folder / INDEX_FILE).is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise ValueError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        read_header(folder / SINGLE_FILE)
        return [folder / SINGLE_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_FILE} has no weight_map")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX_FILE} names {name!r}; a shard must be a .safetensors file in the folder"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}"
        )
    for name in names:
        listed = {tensor for tensor, shard in weight_map.items() if shard == name}
        different = sorted(listed ^ read_header(folder / name)[0].keys())
        if different:
            raise ValueError(
                f"{folder / name} does not hold the tensors that {INDEX_FILE} lists for it, so it "
                f"belongs to another checkpoint or is damaged; {len(different)} differ, "
                f"{different[0]} is one of them"
            )
    return [folder / name for name in names]


def verify_folder(folder: Path) -> dict[str, StoredTensor]:
    """Check a checkpoint folder as far as that goes without building the model.

    Returns:
        Its stored tensors by name.

    Raises:
        ValueError: what is wrong, with the name of the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a checkpoint")
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder} holds {ADAPTER_FILE}, by which transformers would load the model that is named there: give an "
            "adapter a folder of its own"
        )
    config = read_json(folder / "config.json")
    quantization_config = config.get("quantization_config")
    check_format(quantization_config, str(folder))
    stored = read_headers(shard_files(folder), quantization_config.get("checkpoint_id"))
    check_counts(config, len(stored), folder)
    return stored


def check_counts(config: dict[str, Any], tensors: int, folder: Path) -> None:
    """Raise ValueError where a configuration asks for so many blocks or labels that making them would never end."""
    for name, value in flat(
        {k: v for k, v in config.items() if k != "quantization_config"}
    ).items():
        last = name.rpartition(".")[2]
        if type(value) is int and value > MOST_COUNT + tensors and COUNTS.search(last):
            raise ValueError(
                f"{folder / 'config.json'} has {name} {value}, but the checkpoint has {tensors} tensors in all"
            )


def copy_other_files(source: Path, target: Path) -> None:
    """Copy every file of ``source`` that is not weights to ``target``, replacing nothing.

    Left out: files ending in one of ``WEIGHT_SUFFIXES``, indexes of weight shards, and hidden
    folders (.git).
    """
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts[:-1])
        weights = file.suffix.lower() in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if hidden or weights or not file.is_file() or (target / relative).exists():
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / relative)


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Make a ValueError with the name of the folder of the many that libraries raise for files that are damaged.

    Raises:
        ValueError: as it was raised, or in the place of another error; others than those of damage stay.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{folder} is damaged, or its config.json is not of its model ({type(error).__name__}: {error}); copy the "
            "checkpoint again"
        ) from error
