"""A disk that is full, at whatever a run writes, ends it with one message, and the run goes on once there is room.

The system's limit on the size of files stands in for a full disk: writing beyond it fails in the same way.
"""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from command_line import SMALL, refused
from packed_models import pack_randomly
from test_unfinished import QUICK, TOKENS, Killed, run
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant import checkpoint, commit, disk
from nanoquant.checkpoint import load, save_pretrained
from nanoquant.json_files import write_json
from nanoquant.quantize import quantize
from nanoquant.self_text import SelfTextConfig
from nanoquant.tensor_file import TensorFile

pytestmark = pytest.mark.usefixtures("untouched_process")

CONFIG = dataclasses.replace(QUICK, self_text=SelfTextConfig(windows=2, prompt=4))


@contextlib.contextmanager
def full():
    """No file grows beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Fills(Killed):
    """The disk is full from a phase on."""

    def __init__(self, phase, stack):
        super().__init__()
        self.fills, self.stack = phase, stack

    def begin(self, name, total):
        super().begin(name, total)
        if name == self.fills:
            self.stack.enter_context(full())


@pytest.mark.parametrize("phase", ["write text", "calibrate", "ranks", "blocks", "model"])
def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(phase, tmp_path):
    expected, _, _ = run(None, CONFIG)
    places = {"sensitivity_file": tmp_path, "self_text_file": tmp_path, "work": tmp_path}
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(OSError, match="can't be written .*make room, and the same command goes on"),
    ):
        quantize(tiny_llama(), TOKENS, CONFIG, progress=Fills(phase, stack), **places)
    assert not list(tmp_path.glob("**/*.partial")) and not list(tmp_path.glob("*/*.safetensors"))
    model, progress = tiny_llama(), Killed()
    quantize(model, TOKENS, CONFIG, progress=progress, **places)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    before = ["write text", "calibrate", "ranks", "blocks", "model"]
    again = [name for name in before[: before.index(phase)] if progress.counts.get(name, [0])[0]]
    assert again == []  # what was done before is not done again


def test_a_full_disk_leaves_no_checkpoint_and_says_so(tmp_path):
    model = pack_randomly(tiny_llama())
    with full(), pytest.raises(OSError, match="the checkpoint .*out can't be written .*make room"):
        save_pretrained(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert load(save_pretrained(model, tmp_path / "out")) is not None


@pytest.mark.parametrize("refused_at", ["model.safetensors", "config.json", "sync"])
def test_a_move_that_fails_midway_leaves_nothing_and_the_same_call_goes_through(
    refused_at, tmp_path, monkeypatch
):
    model, out = pack_randomly(tiny_llama()), tmp_path / "out"
    rename, replace, sync = Path.rename, Path.replace, checkpoint.sync

    def refuse(how):
        def move(path, target):
            if path.name == refused_at and Path(target).parent == out:
                raise OSError(5, "Input/output error")
            return how(path, target)

        return move

    def last_sync(path):
        if refused_at == "sync" and path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse(rename))
        patch.setattr(Path, "replace", refuse(replace))
        patch.setattr(checkpoint, "sync", last_sync)
        with pytest.raises(OSError, match="the checkpoint .*out can't be written"):
            save_pretrained(model, out, tokenizer=tiny_tokenizer())
    assert list(out.iterdir()) == []
    assert load(save_pretrained(model, out)) is not None


def test_figures_that_can_not_be_written_leave_the_file_before_them(tmp_path):
    write_json(str(tmp_path / "a.json"), {"x": 1})
    with full(), pytest.raises(OSError):
        write_json(str(tmp_path / "a.json"), {"x": "y" * 1000})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_too_little_room_is_refused_before_anything_is_written(
    place, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    command = ["quantize", place / "dense", tmp_path / "new", "--text", place / "text.txt", *SMALL]
    message = refused(capsys, *command)
    assert "checkpoint and up to" in message and "100.0 kB free in" in message
    assert "too little; make room or take another output, or keep none" in message
    assert os.listdir(tmp_path) == []


def test_what_is_kept_already_needs_no_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    room, work = disk.Room(checkpoint=900, unfinished=5000), tmp_path / "out.run"
    with pytest.raises(ValueError, match="4.9 kB too little"):
        disk.check_room(tmp_path / "out", room, work)
    work.mkdir()
    (work / "unfinished-model.safetensors").write_bytes(bytes(4950))
    assert "5.0 kB of it there" in disk.check_room(tmp_path / "out", room, work)


@pytest.fixture
def events(monkeypatch):
    """What was synced, and what was renamed to what, in order; paths as they were then."""
    found, replace, rename = [], Path.replace, Path.rename

    def move(how):
        return lambda path, target: found.append((path, Path(target))) or how(path, target)

    monkeypatch.setattr(Path, "replace", move(replace))
    monkeypatch.setattr(Path, "rename", move(rename))
    monkeypatch.setattr(
        commit.os, "fsync", lambda fd: found.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
    )
    return found


def test_files_are_on_the_disk_before_they_are_renamed_and_folders_after(tmp_path, events):
    TensorFile(tmp_path / "a.safetensors", {}, "tensors").write({"x": torch.ones(3)})
    write_json(str(tmp_path / "b.json"), {})
    for partial in (tmp_path / ".partial" / "a.safetensors", tmp_path / "b.json.partial"):
        at = events.index(partial)
        assert events[at + 1][0] == partial and events[at + 2] == tmp_path


def test_a_checkpoint_is_on_the_disk_before_its_config_says_that_it_is_whole(tmp_path, events):
    folder = save_pretrained(pack_randomly(tiny_llama()), tmp_path / "out")
    moves = [event for event in events if isinstance(event, tuple)]
    assert {target.name for _, target in moves} == {path.name for path in folder.iterdir()}
    assert moves[-1][1] == folder / "config.json"
    first, last = events.index(moves[0]), events.index(moves[-1])
    assert {source for source, _ in moves} <= set(events[:first])
    assert folder in events[first:last] and events[last + 1 :] == [folder, tmp_path]
