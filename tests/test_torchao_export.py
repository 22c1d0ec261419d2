"""torch.export of packed layers and of packed weights: equal results, here and in a fresh process."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from two_packed import KINDS, build, given

from nanoquant.checkpoint import pack_model

LOAD = """
import sys, torch, nanoquant
for name in sys.argv[1:]:
    x, y = torch.load(name + ".io")
    print(torch.equal(torch.export.load(name).module()(x), y))
"""


def model_of(kind, packed):
    model = build(KINDS[kind])
    return pack_model(model) if packed else model


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("packed", [False, True], ids=["weight", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_gives_the_same_for_any_number_of_tokens(kind, packed, strict):
    model, x = model_of(kind, packed), given()
    sizes = ({1: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=sizes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(t.startswith("nanoquant.") for t in targets) == 2  # nothing dense is computed
    for some in (x, x[:, :2], torch.cat([x, x], 1)):
        assert torch.equal(program.module()(some), model(some))


def test_a_fresh_process_loads_them_after_nothing_but_the_import_of_nanoquant(tmp_path):
    names = []
    for kind in KINDS:
        for packed in (True, False):  # a layer first: it needs no class that imports the operators
            model, x = model_of(kind, packed), given()
            names.append(str(tmp_path / f"{len(names)}.pt2"))
            torch.export.save(torch.export.export(model, (x,)), names[-1])
            torch.save((x, model(x)), names[-1] + ".io")
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 6, done.stderr[-3000:]


REFUSED = """
import pickle, sys, torch, nanoquant
try:
    torch.load(sys.argv[1], weights_only=True)
except pickle.UnpicklingError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_model_is_never_loaded_where_weights_alone_are_asked_for(kind, tmp_path):
    model = nn.Sequential(build(KINDS[kind]))
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", REFUSED, tmp_path / "model.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Unsupported global" in done.stdout, done.stderr[-3000:]
