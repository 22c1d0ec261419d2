"""A folder that is no dense model is refused before anything is computed, by what is wrong with it."""

import json

import pytest
import torch
from command_line import SMALL, call, refused
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.sources import check_dense, find_model, load_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("untouched_process")


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


METHODS = {
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "bitsandbytes": {"load_in_4bit": True},
    "compressed-tensors": {},
    "torchao": {},
    "fp8": {},
    "unheard": {},
    5: {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_of_another_method_is_named_with_what_to_do(folder, method):
    edit(folder, quantization_config={"quant_method": method} | METHODS[method])
    with pytest.raises(
        ValueError, match=f"quant_method {method!r}; load it with the library of that"
    ):
        find_model(str(folder))


@pytest.mark.parametrize(
    "command", ["generate", "evaluate", "inspect", "serve", "export", "estimate"]
)
def test_every_command_says_so(folder, command, capsys, tmp_path):
    edit(folder, quantization_config={"quant_method": "gptq"})
    more = {
        "generate": ["--prompt", "x"],
        "evaluate": ["--text", folder / "tokenizer_config.json"],
        "export": ["--output", tmp_path / "o"],
    }
    assert "quant_method 'gptq'" in refused(capsys, command, folder, *more.get(command, []))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": "x"}, "quantization_config 'x'; it must be an object"),
        ({"hidden_size": "64"}, "config.json can't be used.*hidden_size"),
        ({"model_type": "unheard"}, "config.json can't be used"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
    ],
)
def test_a_configuration_that_can_not_be_used_is_named(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(ValueError, match="(?s)" + words):
        find_model(str(folder))


def test_blocks_and_weights_that_the_model_has_no_place_for_are_not_dropped(folder, caplog):
    edit(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"no place for.*model\.layers\.1\.input_layernorm"):
        load_model(folder, CPU)
    edit(folder, num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.ones(2)}, folder / "model.safetensors")
    assert load_model(folder, CPU).training is False
    assert "1 tensors are not used: extra.weight" in caplog.text
    save_file(tensors | {"model.layers.0.foo.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="foo.weight"):
        load_model(folder, CPU)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_of_other_types_are_no_dense_ones(folder, dtype, name):
    tensors = load_file(folder / "model.safetensors")
    changed = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {changed: tensors[changed].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"stored as {name}; allowed: BF16, F32, F16"):
        load_model(folder, CPU)


def test_an_adapter_beside_the_model_is_named(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: merge the adapter"):
        check_dense(find_model(str(folder)))


def test_places_that_would_spoil_the_model_are_refused(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the river runs over stone\n" * 100)
    command = ["quantize", folder, tmp_path / "new", "--text", text, *SMALL]
    before = (folder / "config.json").read_bytes()
    for file, words in (
        (folder / "config.json", "lies in the folder of a model"),
        (text, "holds something else"),
        (tmp_path / "new.run", "is the record of the run"),
    ):
        assert words in refused(capsys, *command, "--json", file)
    assert (folder / "config.json").read_bytes() == before and "river" in text.read_text()
    inside = ["quantize", folder, folder / "new", "--text", text, *SMALL]
    assert "lies in that of the model" in refused(capsys, *inside)
    assert not (tmp_path / "new.run").exists()


def test_a_broken_generation_config_is_named_by_doctor(folder, capsys):
    (folder / "generation_config.json").write_text("{bad")
    code, out, err = call(capsys, "doctor", folder)
    assert code == 2 and "generation_config.json can't be read as JSON" in out + err
