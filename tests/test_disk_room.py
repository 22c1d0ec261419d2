"""The room on the disk that is asked for beforehand is enough, near, and the same whoever asks."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from tiny_models import random_windows, tiny_llama, tiny_tokenizer

from nanoquant import activation_memory, disk, phases, tensor_file
from nanoquant.activations import Activations
from nanoquant.architectures import find_decoder
from nanoquant.budget import allocate_ranks
from nanoquant.config import nanoquant_config
from nanoquant.disk import Room, Streams
from nanoquant.doctor import checks
from nanoquant.estimate.estimate import disk as estimated
from nanoquant.estimate.limits import quantities
from nanoquant.estimate.size import size_of
from nanoquant.estimate.subject import subject_of_folder
from nanoquant.estimate.terms import Use
from nanoquant.quantize import quantize
from nanoquant.sources import load_model

LIMITS = (None, "1B", "600kB")
SCALES = {"train": "scales", "kept_logits": 90}


@pytest.fixture
def folder(tmp_path):
    tiny_llama(dtype=torch.bfloat16, layers=3).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def settings(limit=None, save_every=0, model=None, **changes):
    return nanoquant_config(
        2.0,
        importance={"curvature": "both"},
        calibration={"windows": 256, "length": 16},
        sensitivity={"iterations": 2, "length": 8},
        block={"schedule": "algorithm1", "dense_epochs": 1, "windows": 32},
        admm={"iterations": 2},
        model={"windows": 40, "held_out": 2} | (model or {}),
        run={"save_every": save_every, "activation_memory": limit},
        **changes,
    )


@pytest.mark.parametrize("save_every", [None, 0])
@pytest.mark.parametrize("limit", LIMITS)
def test_the_command_the_doctor_and_the_estimate_ask_for_the_same(
    limit, save_every, folder, tmp_path, monkeypatch
):
    config = settings(limit, save_every)
    rooms = []
    for module in (disk, checks):
        monkeypatch.setattr(
            module, "check_room", lambda output, room, work=None: rooms.append(room)
        )
    disk.check_run(
        tmp_path / "out", tmp_path / "work", tiny_llama(dtype=torch.bfloat16, layers=3), config
    )
    model, shapes, _ = checks.check_parts(folder)
    checks.check_disk(str(tmp_path), model, allocate_ranks(shapes, config.budget), config)
    subject = subject_of_folder(folder, config)
    q = quantities(subject, config, Use(0))
    found = estimated(q, size_of(subject, q.config))
    run, doctor = rooms
    assert run == doctor == dataclasses.replace(found, checkpoint=run.checkpoint)
    assert (
        run.checkpoint <= found.checkpoint < 1.5 * run.checkpoint
    )  # with the headers of its files
    assert (run.activations > 0) == (limit is not None)
    assert (run.unfinished > 0) == (save_every is not None)


def bytes_in(folder):
    """Of its files, and of those without a name that this process has there."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for entry in Path("/proc/self/fd").iterdir():
        try:
            link, found = os.readlink(entry), entry.stat()
        except FileNotFoundError:
            continue
        size += 512 * found.st_blocks if link.startswith(f"{folder}/") and not found.st_nlink else 0
    return size


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
@pytest.mark.parametrize(
    ("limit", "model"),
    [(None, {}), ("1B", SCALES), *((limit, {"train": "none"}) for limit in LIMITS)],
    ids=str,
)
def test_the_most_that_a_run_has_on_the_disk_is_below_and_near(
    limit, model, folder, tmp_path, monkeypatch
):
    config, work, sizes = (
        settings(limit, model=model),
        tmp_path / "work",
        {"commit": [], "scratch": []},
    )

    def watched(module, name):
        plain = getattr(module, name)

        def call(*arguments):
            sizes[name].append(bytes_in(work))  # what is written anew is there beside the old one
            found = plain(*arguments)
            sizes[name].append(bytes_in(work))
            return found

        monkeypatch.setattr(module, name, call)

    watched(tensor_file, "commit")
    watched(activation_memory, "scratch")
    rooms = []
    with monkeypatch.context() as patch:
        patch.setattr(disk, "check_room", lambda output, room, work: rooms.append(room))
        dense = load_model(folder, torch.device("cpu"))
        disk.check_run(tmp_path / "out", work, dense, config)
    quantize(dense, random_windows(320, 16).flatten(), config, work=work)
    assert bool(sizes["scratch"]) == (limit is not None)
    most, (room,) = max(sizes["commit"] + sizes["scratch"]), rooms
    assert most < room.unfinished + room.activations < 2 * most
    shared = [file.stat().st_size for file in work.iterdir()]
    assert sum(shared) < room.unfinished


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (None, 0),
        ("1B", 3 * 8192),
        ("4999B", 3 * 8192),
        ("5kB", 2 * 8192),
        ("9999B", 2 * 8192),
        ("1MB", 0),
    ],
)
def test_what_finds_no_room_in_memory_lies_on_the_disk_in_whole_tensors(limit, size, monkeypatch):
    monkeypatch.setattr(disk, "PAGESIZE", 4096)
    assert Streams(3, 5000).beyond(limit) == size


@pytest.mark.parametrize("windows", [4, 24])
def test_blocks_keep_activations_of_their_own_windows_however_few_calibration_has(
    windows, monkeypatch
):
    config, kept = settings(save_every=None), []
    config = dataclasses.replace(
        config,
        calibration=dataclasses.replace(config.calibration, windows=8),
        block=dataclasses.replace(config.block, windows=windows),
        model=dataclasses.replace(config.model, train="none"),
    )

    class Watched(Activations):
        def advance(self, block, data, name):
            kept.append([self.dense.nbytes, self.quantized.nbytes])
            super().advance(block, data, name)

    monkeypatch.setattr(phases, "Activations", Watched)
    model = tiny_llama(dtype=torch.bfloat16, layers=3)
    _, tuned, _ = disk.streams(model, 3, range(3), config)
    quantize(model, random_windows(40, 16).flatten(), config)
    assert kept == 3 * [[tuned.each, tuned.each]] and tuned.bytes == sum(kept[0])


def test_states_of_the_teacher_lie_on_the_disk_where_they_find_no_room():
    model = tiny_llama(dtype=torch.bfloat16, layers=3)
    for epochs, tensors in ((1, 0), (2, 1)):
        config = settings(model={"epochs": epochs}, self_text={"windows": 3})
        _, _, states = disk.streams(model, 3, range(3), config)
        width = model.config.hidden_size * 2
        assert states == Streams(tensors, (40 + 2 + 3) * 16 * width)


def test_a_run_asks_for_the_largest_of_its_streams():
    model = tiny_llama(dtype=torch.bfloat16, layers=3)
    decoder, sizes = find_decoder(model), {}
    config = settings("1B", model={"windows": 4000, "epochs": 2})
    *_, states = disk.streams(model, 3, range(3), config)
    assert disk.room_of(model, decoder, range(3), sizes, config).activations == states.beyond("1B")


def test_activations_are_part_of_what_is_too_much(tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "of activations" not in disk.check_room(tmp_path / "out", Room(900, 50))
    with pytest.raises(
        ValueError, match=r"0.1 kB of activations.*0.1 kB too little.*or raise run\.act"
    ):
        disk.check_room(tmp_path / "out", Room(900, 50, 100))
