"""Spectra are those of the dense source, found where the run names it, and never fetched."""

import huggingface_hub
import pytest
import torch
from run_folders import write_head, write_run, write_source
from safetensors.torch import load_file

from nanoquant.budget import real_rank
from nanoquant.report.run_files import read_run
from nanoquant.report.spectra import Spectrum, chosen_layers, layer_spectra, source_folder


@pytest.fixture
def run(tmp_path):
    write_source(tmp_path / "dense")
    return read_run(write_run(tmp_path / "out.run"))


def test_values_and_energy_are_those_of_the_weight(run):
    found = layer_spectra(run, 4)
    weights = load_file(run.folder.parent / "dense" / "model.safetensors")
    assert len(found) == 4
    for spectrum in found:
        weight = weights["model.layers.{}.{}.weight".format(*spectrum.cell)]
        assert spectrum.shape == tuple(weight.shape)
        values = torch.linalg.svdvals(weight.double())
        assert torch.tensor(spectrum.values).allclose(values.float(), rtol=1e-4)
        energy = (values**2).cumsum(0) / (values**2).sum()
        assert torch.tensor(spectrum.energy).allclose(energy.float(), atol=1e-5)


def test_ranks_are_those_of_the_budget_within_what_the_shape_allows():
    spectrum = Spectrum((0, "a"), (576, 1536), [1.0] * 576)
    assert spectrum.rank(1.0) == int(real_rank(576, 1536, 1.0)) == 402
    assert (spectrum.rank(1e-9), spectrum.rank(16.0)) == (1, 576)
    assert Spectrum((0, "a"), (4, 4), [0.0] * 4).energy == [0.0] * 4


def test_layers_are_of_first_middle_and_last_block_and_of_the_worst_and_best_kind(run):
    assert chosen_layers(run, 6) == [
        *((block, "mlp.down_proj") for block in range(3)),
        *((block, "self_attn.q_proj") for block in range(3)),
    ]
    assert len(chosen_layers(run, 100)) == 9


@pytest.mark.parametrize("source", ["nowhere", "owner/name", "/nowhere/at/all", "a" * 150])
def test_a_source_that_is_not_here_is_named_and_not_fetched(run, source, monkeypatch):
    def refuse(name, local_files_only):
        assert local_files_only
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    write_head(run.folder, source=source)
    with pytest.raises(ValueError, match=f"{source}' is not on this machine; run nanoquant report"):
        source_folder(read_run(run.folder))


@pytest.mark.parametrize("source", ["a" * 5000, "a\0b", "b/" * 3000])
def test_a_source_that_no_system_takes_as_a_name_is_refused_all_the_same(run, source):
    write_head(run.folder, source=source)
    with pytest.raises(ValueError, match="is not on this machine"):
        source_folder(read_run(run.folder))


def test_a_source_in_the_cache_of_the_hub_is_found(run, monkeypatch):
    cached = run.folder.parent / "dense"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(cached))
    write_head(run.folder, source="owner/name")
    assert source_folder(read_run(run.folder)) == cached


def test_another_model_in_the_place_of_the_source_is_refused(run):
    other = write_source(run.folder.parent / "other", kinds={"mixer.in_proj": (8, 8)})
    write_head(run.folder, source=str(other))
    with pytest.raises(ValueError, match="none of the layers that the run names is a matrix"):
        layer_spectra(read_run(run.folder), 3)


def test_a_run_without_a_source_or_layers_has_no_spectra(run):
    for source in (None, "", 3):
        write_head(run.folder, source=source)
        with pytest.raises(ValueError, match="does not name the dense model"):
            layer_spectra(read_run(run.folder), 3)
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="names no layers"):
        chosen_layers(read_run(run.folder), 3)
