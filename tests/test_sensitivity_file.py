"""Measured losses come back from their file, and from no damaged one."""

import pytest

from nanoquant.quantize import quantize
from nanoquant.sensitivity import GroupLoss, SensitivityFile, check_place


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "fingerprint": "a", "groups": {"g": 1}}',
        '{"format": 1, "fingerprint": "a", "groups": {"g": {"divergence": null, "errors": {}}}}',
        '{"format": 1, "fingerprint": "a", "groups": {"g": {"divergence": -5, "errors": {}}}}',
        '{"format": 1, "fingerprint": "a", "groups": {"g": {"divergence": 1, "errors": {"x": {"8": NaN}}}}}',
    ],
)
def test_a_damaged_file_is_measured_again_and_named(content, tmp_path, caplog):
    file = tmp_path / "s.json"
    file.write_text(content)
    assert SensitivityFile(file, "a").groups == {}
    assert f"{file} is damaged" in caplog.text


def test_a_file_that_can_not_be_written_ends_the_run(tmp_path):
    (tmp_path / "file").touch()
    known = SensitivityFile(tmp_path / "file" / "s.json", "a")
    with pytest.raises(OSError, match="s.json can't be written .*the same command goes on"):
        known.add("a", GroupLoss(0.5, {"x": {8: 1.0}}))


def test_a_file_of_another_kind_is_no_place_and_refused_before_any_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "new", tmp_path / "new.json"):
        check_place(place)
    with pytest.raises(ValueError, match="notes.txt is a file, but no .json one; give"):
        quantize(None, "text", sensitivity_file=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_measured_comes_back_from_the_file(tmp_path):
    group = GroupLoss(0.25, {"x": {8: 1.5, 16: 0.5}})
    SensitivityFile(tmp_path / "s.json", "a").add("key", group)
    assert SensitivityFile(tmp_path / "s.json", "a").groups == {"key": group}
    assert SensitivityFile(tmp_path / "s.json", "b").groups == {}


def test_a_folder_keeps_a_file_for_each_fingerprint(tmp_path):
    group = GroupLoss(1.0, {"a": {8: 2.0}})
    for mark in ("a", "b"):
        SensitivityFile(tmp_path / "new" / "folder", mark).add(mark, group)
    names = [file.name for file in sorted((tmp_path / "new" / "folder").iterdir())]
    assert names == ["sensitivity-a.json", "sensitivity-b.json"]
    assert SensitivityFile(tmp_path / "new" / "folder", "b").groups == {"b": group}
