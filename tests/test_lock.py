"""Two processes never work in one folder, and a dead one holds nothing."""

import fcntl
import os
import subprocess
import sys
import time

import pytest

from nanoquant import lock
from nanoquant.lock import exclusive, hold_again

HOLD = """
import sys, time
from nanoquant.lock import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_is_kept_off_until_it_is_dead(holder, tmp_path):
    with (
        pytest.raises(ValueError, match=r"another process is at work in .*run; wait for it"),
        exclusive(tmp_path / "run"),
    ):
        pass
    holder.kill()
    holder.wait()
    time.sleep(0.1)
    with exclusive(tmp_path / "run"):
        assert set(lock._held) == {tmp_path / "run"}
    assert not lock._held and os.listdir(tmp_path / "run") == []


def test_a_folder_that_somebody_removes_is_held_again(tmp_path, caplog):
    folder = tmp_path / "run"
    with exclusive(folder):
        hold_again(folder)
        assert not caplog.text
        folder.rmdir()
        hold_again(folder)
        assert "run was removed while a run was at work there" in caplog.text
        command = [sys.executable, "-c", HOLD, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "another process is at work in" in done.stderr
    assert not lock._held
    hold_again(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_another_process_made_anew_is_its_own(tmp_path, request):
    with exclusive(tmp_path / "run"):
        (tmp_path / "run").rmdir()
        request.getfixturevalue("holder")
        with pytest.raises(ValueError, match="another process is at work"):
            hold_again(tmp_path / "run")


def test_calls_of_one_process_may_be_nested(tmp_path):
    with exclusive(tmp_path), exclusive(str(tmp_path)), exclusive(None):
        assert set(lock._held) == {tmp_path}
    assert not lock._held


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path):
        raise KeyError
    with exclusive(tmp_path):
        pass


def test_a_folder_that_can_not_be_made_is_told(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with exclusive(tmp_path / "file"):
        assert "file can't be locked ([Errno 17] File exists" in caplog.text


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path):
        assert "can't be locked ([Errno 37] No locks available)" in caplog.text
