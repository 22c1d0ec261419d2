"""Files of torch.save are read without their code, and never in more memory than they have bytes."""

import zipfile

import pytest
import torch

from nanoquant.tensor_pickles import load_pickle


def recompressed(file, target):
    """The same archive with compressed records."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_was_saved_comes_back(zipped, tmp_path):
    whole = torch.arange(12.0)
    state = {"a": whole[:6].view(2, 3), "b": whole[6:], "tied": whole[6:], "n": 3, "shape": (2, 3)}
    torch.save(state, tmp_path / "s.pt", _use_new_zipfile_serialization=zipped)
    found = load_pickle(tmp_path / "s.pt")
    assert found.keys() == state.keys() and found["n"] == 3 and found["shape"] == (2, 3)
    assert all(torch.equal(found[name], state[name]) for name in ("a", "b", "tied"))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**12),
        {"a": torch.zeros(4).expand(100, 4)},
        dict(zip("abc", torch.zeros(8).unfold(0, 6, 1), strict=True)),
    ],
    ids=["one value as many", "one row as many", "overlapping views"],
)
def test_tensors_that_say_more_than_is_stored_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="bytes, but .* are stored of them"):
        load_pickle(tmp_path / "s.pt")


def test_compressed_records_are_refused(tmp_path):
    torch.save(torch.zeros(2**20), tmp_path / "s.pt")
    recompressed(tmp_path / "s.pt", tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 2**16
    with pytest.raises(ValueError, match="records are compressed"):
        load_pickle(tmp_path / "small.pt")


@pytest.mark.parametrize("tensor", [torch.zeros(3, device="meta"), torch.eye(3).to_sparse()])
def test_other_than_plain_tensors_are_refused(tensor, tmp_path):
    torch.save({"a": tensor}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="a is no plain tensor|is damaged or no file of tensors"):
        load_pickle(tmp_path / "s.pt")


def test_a_file_without_tensors_is_refused_without_advice_to_run_it(tmp_path):
    (tmp_path / "s.pt").write_bytes(b"no tensor")
    with pytest.raises(ValueError, match="no file of torch.save") as caught:
        load_pickle(tmp_path / "s.pt")
    assert "weights_only" not in str(caught.value)
