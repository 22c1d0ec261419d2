"""Importances that nobody asks for any more leave memory, before the whole model is trained."""

import dataclasses
import weakref

import pytest
import torch
from test_unfinished import QUICK, TOKENS, Kill, Killed
from tiny_models import tiny_llama

from nanoquant.importance import Importance, ImportanceConfig
from nanoquant.importance_store import ImportanceStore, as_tensors, statistics_bytes
from nanoquant.quantize import quantize
from nanoquant.second_moment import Correlation
from nanoquant.tensor_file import TensorFile
from nanoquant.training import RunConfig


def correlated(d_in, d_out):
    """An importance of random numbers with both correlations."""
    R, L = (Correlation(torch.randn(d, d), torch.rand(d)) for d in (d_in, d_out))
    return Importance(torch.rand(d_in), torch.rand(d_out), R, L)


def test_release_leaves_no_correlation_alive_and_the_diagonals_whole():
    store = ImportanceStore(lambda b: TensorFile(None, {}, "importances"))
    for b in range(2):
        store.keep(b, {f"{b}.q": correlated(8, 4)})
    held = [known for b in range(2) for known in store(b).values()]
    both = [known for one in held for known in (one.input_correlation, one.output_correlation)]
    refs = [weakref.ref(tensor) for known in both for tensor in known]
    del held, both
    found = store.diagonals(range(2))
    assert len(refs) == 8 and all(ref() is not None for ref in refs)
    store.release()
    assert not any(ref() is not None for ref in refs)
    assert [known.input.shape for known in found.values()] == [(8,), (8,)]
    assert all(known.input_correlation is None for known in found.values())


@pytest.mark.parametrize("save_every", [None, 0])
def test_no_correlation_is_alive_when_the_model_phase_begins(save_every, tmp_path, monkeypatch):
    refs, keep = [], ImportanceStore.keep

    def watched(self, b, importances):
        refs.extend(weakref.ref(known.input_correlation.Q) for known in importances.values())
        keep(self, b, importances)

    class Look(Killed):
        def begin(self, name, total):
            super().begin(name, total)
            if name == "model":
                assert len(refs) == 14 and not any(ref() is not None for ref in refs)
                raise Kill

    config = dataclasses.replace(
        QUICK,
        importance=ImportanceConfig(curvature="inputs"),
        run=RunConfig(save_every=save_every),
    )
    monkeypatch.setattr(ImportanceStore, "keep", watched)
    with pytest.raises(Kill):
        quantize(tiny_llama(), TOKENS, config, progress=Look(), work=tmp_path)


@pytest.mark.parametrize("curvature", ["diagonal", "inputs", "both"])
def test_bytes_are_those_of_the_tensors(curvature):
    known = correlated(8, 4)
    if curvature != "both":
        known = dataclasses.replace(known, output_correlation=None)
    if curvature == "diagonal":
        known = dataclasses.replace(known, input_correlation=None)
    tensors = as_tensors({"q": known})[0].values()
    assert statistics_bytes([(4, 8)], [8], curvature) == sum(t.nbytes for t in tensors)
