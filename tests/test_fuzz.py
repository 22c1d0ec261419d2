"""Damaged files end in an error of a documented kind, or load as what they hold; thousands of cases are slow."""

import json

import fuzz_checkpoints
import fuzz_readers
import fuzz_run
import pytest
import torch
from fuzz_damage import split
from safetensors.torch import load_file, save_file

from nanoquant import load, read_sizes
from nanoquant.json_files import parse_json
from nanoquant.parsers import parse_quantize
from nanoquant.stored_tensors import read_header
from nanoquant.yaml_files import read_yaml


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return fuzz_checkpoints.make_intact(tmp_path_factory.mktemp("fuzz") / "intact")


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz_readers.make_intact(tmp_path_factory.mktemp("fuzz") / "intact")


@pytest.fixture
def folder(checkpoints, tmp_path):
    checkpoints["signs"].write(tmp_path)
    return tmp_path


def findings(module, intact, folder, numbers):
    cases = {number: module.run_case(intact, folder / "case", 0, number) for number in numbers}
    return {number: case for number, case in cases.items() if case[2] is not None}


def test_damaged_checkpoints_are_refused_or_load_as_what_they_hold(checkpoints, tmp_path):
    assert findings(fuzz_checkpoints, checkpoints, tmp_path, range(250)) == {}


def test_other_damaged_files_are_refused_or_read(readers, tmp_path):
    assert findings(fuzz_readers, readers, tmp_path, range(400)) == {}


@pytest.mark.slow
def test_thousands_of_damaged_files_end_no_process():
    for module, count in ((fuzz_checkpoints, 3000), (fuzz_readers, 3000)):
        counts, found = fuzz_run.run(module.make_intact, module.run_case, 1, list(range(count)))
        assert counts.total() == count and found == {}


def test_a_silent_load_is_found(checkpoints, folder):
    """The judge itself: a model other than its files is what it looks for."""
    found = fuzz_checkpoints.state_of(load(folder))
    assert fuzz_checkpoints.silent(found, folder) is None
    found["model.norm.weight"][3] += 1
    assert "model.norm.weight" in fuzz_checkpoints.silent(found, folder)


def edit_header(file, change):
    header, data = split(file.read_bytes())
    value = json.loads(header)
    change(value)
    text = json.dumps(value).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "I16", "is I16|but has"),
        ("dtype", "Q7", "has dtype 'Q7'"),
        ("shape", [-64], "has shape"),
        ("shape", [63], "but has 256 bytes"),
        ("data_offsets", [0, 256], "begins at byte"),
        ("data_offsets", [-256, 0], "offsets -256, 0"),
    ],
)
def test_a_header_that_lies_is_refused_with_the_tensor(folder, field, value, words):
    file = folder / "model.safetensors"
    edit_header(file, lambda header: header["model.norm.weight"].update({field: value}))
    with pytest.raises(ValueError, match=words):
        read_header(file)


def test_a_scale_that_is_not_finite_is_named_when_it_is_loaded(folder):
    file = folder / "model.safetensors"
    tensors, metadata = load_file(file), read_header(file)[1]
    tensors["model.layers.0.mlp.up_proj.s1"][5] = torch.nan
    save_file(tensors, file, metadata)
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.up_proj.s1 holds a value that is not finite"
    ):
        load(folder)


def test_integers_in_the_place_of_numbers_are_refused(folder):
    file = folder / "model.safetensors"
    edit_header(file, lambda header: header["model.norm.weight"].update({"dtype": "I32"}))
    with pytest.raises(
        ValueError, match="model.norm.weight .* is I32 .* asks for BF16 or F16 or F32 or F64"
    ):
        load(folder)


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_labels"])
def test_counts_that_would_take_forever_are_refused_at_once(folder, field):
    edit_config(folder, **{field: 10**9})
    with pytest.raises(ValueError, match=f"{field} 1000000000, but the checkpoint has"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("num_attention_heads", 0), ("hidden_act", 3), ("head_dim", 10**30)]
)
def test_a_configuration_that_makes_no_model_is_a_value_error_with_the_folder(folder, field, value):
    edit_config(folder, **{field: value})
    for read in (load, read_sizes):
        with pytest.raises(ValueError):
            read(folder)


def test_a_configuration_of_another_dtype_than_the_file_asks_for_a_choice(folder):
    edit_config(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="is F32, but config.json makes torch.bfloat16 of it"):
        load(folder)
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_an_adapter_in_the_folder_does_not_send_the_loader_elsewhere(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ValueError, match="give an adapter a folder of its own"):
        load(folder)


def test_depth_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_yaml_that_stands_for_more_than_fits_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    for text, words in (("a: &a [1]\nb: *a\n", "aliases"), ("a: " + "[" * 5000, "levels")):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_yaml(file)
        for flag in (["--calibration", str(file)], ["--config", str(file)]):
            with pytest.raises(ValueError, match=words):
                parse_quantize(["MODEL", "OUT", *flag])


@pytest.mark.parametrize(
    "text", ["bits: 0.8\nrun: {seed: 1}\nbits: 1.0\n", "run: {seed: 1, seed: 2}\n"]
)
def test_a_key_that_is_given_twice_is_named(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"(bits|seed) is given twice, in lines 1 and \d"):
        parse_quantize(["MODEL", "OUT", "--config", str(file)])
