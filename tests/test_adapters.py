"""Folders of adapters: they come back, merge where they can, and misfits and damage are named."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_fine_tuning import lora, packed, wake
from tiny_models import random_windows

import nanoquant
from nanoquant.adapters import load_adapter, save_adapter


@pytest.fixture
def checkpoint(tmp_path):
    nanoquant.save_pretrained(packed(), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def adapter(checkpoint, tmp_path):
    tuned = wake(get_peft_model(nanoquant.load(checkpoint), lora()))
    save_adapter(tuned, tmp_path / "adapter")
    return tmp_path / "adapter", tuned(random_windows(2, 16)).logits


def test_an_adapter_comes_back_from_its_folder_by_peft_alone(checkpoint, adapter):
    folder, logits = adapter
    for read in (load_adapter, PeftModel.from_pretrained):
        again = read(nanoquant.load(checkpoint), folder)
        assert torch.equal(again(random_windows(2, 16)).logits, logits)


def test_an_adapter_merges_into_dequantized_weights_alone(checkpoint, adapter):
    folder, logits = adapter
    tuned = load_adapter(nanoquant.load(checkpoint), folder)
    for merge in (tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(ValueError, match=r"can't be merged.*dequantize\(\)"):
            merge()
    with pytest.raises(ValueError, match="can't be merged"):
        next(m for m in tuned.modules() if hasattr(m, "lora_A")).merge()
    assert torch.equal(tuned(random_windows(2, 16)).logits, logits)
    dense = PeftModel.from_pretrained(nanoquant.load(checkpoint).dequantize(), folder)
    merged = dense.merge_and_unload()
    torch.testing.assert_close(merged(random_windows(2, 16)).logits, logits, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_has_no_place_for_an_adapter(checkpoint, adapter, tmp_path):
    tuned = load_adapter(nanoquant.load(checkpoint), adapter[0])
    with pytest.raises(ValueError, match="carries an adapter.*save_adapter"):
        nanoquant.save_pretrained(tuned, tmp_path / "out")
    nanoquant.save_pretrained(tuned.unload(), tmp_path / "out")


def test_transformers_trains_adapters_and_no_packed_model_without_one(checkpoint):
    from transformers.trainer_utils import validate_quantization_for_training

    model = nanoquant.load(checkpoint)
    with pytest.raises(ValueError, match="adapters"):  # it would train embedding and norms alone
        validate_quantization_for_training(model)
    validate_quantization_for_training(get_peft_model(model, lora()))


def test_a_peft_with_other_internals_stays_usable_and_adapters_are_refused(tmp_path):
    """In a process of its own: what it replaces is replaced once."""
    code = """
import peft.tuners.tuners_utils as inside
del inside._maybe_include_all_linear_layers
create = peft.tuners.lora.LoraModel._create_new_module
import nanoquant
assert peft.tuners.lora.LoraModel._create_new_module is create
from nanoquant.adapters import require_peft
try:
    require_peft()
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import peft" + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lacks what packed linears extend" in done.stdout
    assert "nanoquant.lora" in done.stderr


@pytest.mark.parametrize(
    "change", [{"peft_type": "FOO"}, {"r": "x"}, {"target_modules": 5}], ids=str
)
def test_a_damaged_adapter_is_a_value_error(change, adapter):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="adapter"):
        load_adapter(packed(), folder)


@pytest.mark.parametrize(
    "spoil", [lambda t: t.flatten(), lambda t: t * float("nan")], ids=["1-D", "nan"]
)
def test_damaged_numbers_of_an_adapter_are_named(spoil, adapter):
    folder, _ = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: spoil(tensors[name]).contiguous()}, file)
    with pytest.raises(ValueError, match="the adapter is damaged"):
        load_adapter(packed(), folder)


def test_an_adapter_of_another_shape_is_named(adapter):
    folder, _ = adapter
    for read in (load_adapter, PeftModel.from_pretrained):
        with pytest.raises(ValueError, match="for rank 4 and 96 outputs, but here.* 4 and 80"):
            read(packed(intermediate_size=80), folder)


def test_an_adapter_of_another_rank_is_named(adapter):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(ValueError, match="for rank 4 and 64 inputs, but here are rank 8"):
        load_adapter(packed(), folder)


def test_an_adapter_of_another_checkpoint_or_model_is_named(adapter, tmp_path):
    folder, _ = adapter
    nanoquant.save_pretrained(packed(size=64), tmp_path / "other")
    with pytest.raises(ValueError, match="checkpoint_id.*other signs or scales"):
        load_adapter(nanoquant.load(tmp_path / "other"), folder)
    with pytest.raises(ValueError, match="layers model.layers.1.*does not have"):
        load_adapter(packed(layers=1), folder)
    with pytest.raises(ValueError, match="is no adapter"):
        load_adapter(packed(), tmp_path / "other")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_adapter(packed(), folder)


def test_an_adapter_that_lacks_a_layer_is_named(adapter):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    names = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    config["target_modules"] = names
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has nothing for model.layers.2"):
        load_adapter(packed(layers=3), folder)
