"""A folder for output is refused before anything is computed where it can't be made or is taken."""

from pathlib import Path

import pytest

from nanoquant.output_folder import check_output_folder


def test_an_output_folder_that_can_be_made_is_accepted_and_left_unmade(tmp_path):
    for name in ("", "new", "a/b/new"):
        assert check_output_folder(tmp_path / name) == tmp_path / name
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_at_or_under_a_file_is_refused(tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(ValueError, match="file.txt' is a file"):
        check_output_folder(tmp_path / "file.txt")
    with pytest.raises(ValueError, match="out' can't be made: '.*file.txt' is a file"):
        check_output_folder(tmp_path / "file.txt" / "a" / "out")
    with pytest.raises(ValueError, match="nowhere' is a file"):
        check_output_folder(tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that refuses even root")
@pytest.mark.parametrize("name", ["/proc/out", "/proc/self/a/b"])
def test_an_output_folder_where_nothing_can_be_written_is_refused(name):
    with pytest.raises(ValueError, match=f"the output folder '{name}' can't be written: /proc"):
        check_output_folder(name)
