"""``import nanoquant`` is light, lists its names, and makes transformers load quantized folders."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import random_windows, tiny_llama
from torch import nn
from torchao.quantization import quantize_

import nanoquant
from nanoquant.admm import ADMMConfig
from nanoquant.budget import BudgetConfig


def python(code, *arguments):
    """Run code in a fresh interpreter and return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_exists_and_is_no_module():
    assert len(nanoquant.__all__) <= 23
    for name in nanoquant.__all__:
        assert name in dir(nanoquant)
        assert isinstance(getattr(nanoquant, name), str if name == "__version__" else object)
        assert type(getattr(nanoquant, name)).__name__ != "module"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise"):
        nanoquant.quantise  # noqa: B018
    with pytest.raises(ImportError):
        exec("from nanoquant import quantise")


def test_functions_are_not_hidden_by_the_submodules_of_their_name():
    import nanoquant.generate
    import nanoquant.quantize  # noqa: F401
    from nanoquant.quantize import QuantizationReport

    assert nanoquant.quantize.__name__ == "quantize" and callable(nanoquant.quantize)
    assert callable(nanoquant.generate)
    assert QuantizationReport is sys.modules["nanoquant.quantize"].QuantizationReport


def test_the_version_stands_once_where_a_build_reads_it_without_importing():
    source = Path(nanoquant.__file__).read_text(encoding="utf-8")
    values = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert values == [nanoquant.__version__]
    settings = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'version = { attr = "nanoquant.__version__" }' in settings
    assert not re.search(r'^version = "', settings, re.MULTILINE)


LIGHT = """
import sys, time
import torch, transformers
begun = time.perf_counter()
import nanoquant
seconds = time.perf_counter() - begun
heavy = {"torchao", "lightning", "triton", "datasets", "wandb", "jsonargparse"} & set(sys.modules)
print(seconds < 0.5, sorted(heavy), torch.cuda.is_initialized())
nanoquant.BinaryLowRankLinear
print(sorted({"torchao", "lightning"} & set(sys.modules)))
"""


def test_import_takes_no_time_loads_nothing_heavy_and_starts_no_gpu():
    assert python(LIGHT).splitlines() == ["True [] False", "[]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A quantized tiny model, and its logits."""
    model = tiny_llama()
    config = nanoquant.NanoQuantConfig(
        budget=BudgetConfig(bits=1.5, rank_multiple=8), admm=ADMMConfig(iterations=5)
    )
    quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "proj" in name)
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    nanoquant.save_pretrained(nanoquant.pack_model(model), path)
    with torch.no_grad():
        torch.save(model(input_ids=random_windows(1, 8)).logits, path.parent / "logits.pt")
    return path


LOAD = """
import sys
import torch
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
windows = torch.randint(3, 128, (1, 8), generator=torch.manual_seed(0))
with torch.no_grad():
    logits = model(input_ids=windows).logits
print(torch.equal(logits, torch.load(sys.argv[1] + "/../logits.pt")), "lightning" in sys.modules)
"""
FIRST = """
import nanoquant
import importlib.util
importlib.util.find_spec("transformers.modeling_utils")  # finding it is not importing it
from transformers import AutoModelForCausalLM
"""
LAST = """
from transformers import AutoModelForCausalLM, PreTrainedModel
import nanoquant
"""


@pytest.mark.parametrize("imports", [FIRST, LAST], ids=["nanoquant_first", "transformers_first"])
def test_transformers_loads_the_folder_in_a_fresh_process_after_the_import_alone(imports, folder):
    assert python(LOAD.format(imports=imports), folder) == "True False"
