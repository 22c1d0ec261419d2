"""Fixtures of the command line: a folder with a dense model and its text, one finished run, one benchmark."""

import gc
import json
import logging
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from command_line import SMALL, WORDS
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant import console
from nanoquant.cli import main


def pytest_collection_finish():
    """Keep the libraries' own objects out of every later garbage collection, of which tuning makes many."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let the libraries take themselves down as they are used to."""
    gc.unfreeze()


@contextmanager
def same_loggers():
    """Context after which the loggers that commands change are as they were."""
    loggers = [logging.getLogger(name) for name in ("nanoquant", *console.QUIET_LOGGERS)]
    before = [(log.level, log.handlers, log.propagate) for log in loggers]
    yield
    for log, (level, handlers, propagate) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.handlers, log.propagate = handlers, propagate


@pytest.fixture(scope="module", autouse=True)
def loggers_of_a_module():
    """Fixtures of a module may run commands as well: the next module finds loggers as they were."""
    with same_loggers():
        yield


@pytest.fixture
def untouched_process(monkeypatch):
    """Undo what the commands change for the whole process: environment and loggers."""
    for name, value in console.QUIET_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with same_loggers():
        yield


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a dense model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(WORDS * 100)
    return folder


@pytest.fixture(scope="session")
def finished(place):
    """A whole run of the quantize command in a process of its own."""
    command = [sys.executable, "-m", "nanoquant", "quantize", "dense", "out", *SMALL]
    command += ["--text", "text.txt", "--eval-text", "text.txt", "--eval-windows", "4"]
    command += ["--eval-length", "32", "--sample", "the river", "--sample-tokens", "5"]
    command += ["--verify", "--json", "figures.json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def figures(place, finished):
    return json.loads((place / "figures.json").read_text())


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory):
    """A folder that holds nothing but the config.json of a small model."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    wide = {"hidden_size": 256, "intermediate_size": 320}
    tiny_llama(layers=2, dtype=torch.bfloat16, **wide).config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bench_run(config_folder):
    """Text and figures of one run of all parts."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("nanoquant.benchmark.command.say", lines.append)
        file = config_folder.parent / "bench.json"
        flags = (
            f"--model {config_folder} --tokens 1,3 --bits 0.8 --rotate-megabytes 2 --layers 1 "
            f"--context 16 --json {file}"
        )
        assert main(["bench", *flags.split()]) == 0
    return "\n".join(lines), json.loads(file.read_text())


@pytest.fixture
def undrawn(monkeypatch):
    """Plots of a report are made, but not drawn: for tests of what the page says."""
    pytest.importorskip("matplotlib")
    from nanoquant.report import style

    monkeypatch.setattr(style, "_png", lambda draw, theme, height: b"")
