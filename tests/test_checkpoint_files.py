import json
import shutil

import pytest
import torch
import transformers
from packed_models import pack_randomly
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from nanoquant.checkpoint import load, save_pretrained
from nanoquant.checkpoint_files import (
    CHECKPOINT_KEY,
    FORMAT_VERSION,
    INDEX_FILE,
    read_header,
    verify_folder,
)
from nanoquant.model_folder import resolve_folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two sharded checkpoints with equal names and shapes of tensors, and other values."""
    root = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate("ab"):
        model = pack_randomly(tiny_llama())
        model.model.norm.weight.data += seed
        save_pretrained(model, root / name, max_shard_size="20KB")
    return root


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals / "a", tmp_path / "checkpoint")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def assert_refused(folder, message):
    """Both ways of loading refuse the folder with this message."""
    with pytest.raises(ValueError, match=message):
        load(folder)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_an_intact_folder_lists_its_tensors(folder):
    stored = verify_folder(folder)
    tensor = stored["model.layers.0.mlp.up_proj.u_signs"]
    assert tensor.dtype == "U8" and tensor.shape == (96, 4) and tensor.bytes == 96 * 4


def test_a_missing_shard_is_named(folder):
    shards(folder)[1].unlink()
    assert_refused(folder, "lacks 1 of .* shards: model-00002")


@pytest.mark.parametrize("cut", [1, 1000], ids=["last byte", "more"])
def test_a_truncated_shard_is_named_with_its_bytes(folder, cut):
    shard = shards(folder)[0]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - cut)
    assert_refused(folder, f"{shard.name} is damaged: expected {size} bytes, found {size - cut}")


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_shard_without_a_whole_header_is_named(folder, size):
    with shards(folder)[0].open("r+b") as file:
        file.truncate(size)
    assert_refused(folder, "model-00001.*truncated")


def test_a_file_that_is_not_safetensors_is_named(folder):
    shards(folder)[0].write_bytes((4).to_bytes(8, "little") + b"spam")
    assert_refused(folder, "model-00001.*not a safetensors file")


def test_a_shard_of_another_checkpoint_of_the_same_shapes_is_named(originals, folder):
    shutil.copy(originals / "b" / shards(folder)[1].name, folder)
    assert_refused(folder, "model-00002.*belongs to another checkpoint")


def test_a_shard_without_an_id_is_named_when_config_has_one(folder):
    shard = shards(folder)[1]
    save_file(load_file(shard), shard, {"format": "pt"})
    assert_refused(folder, "model-00002.*belongs to another checkpoint: its id is missing")


def test_a_shard_with_other_tensors_than_the_index_lists_is_named(folder):
    save_file({"foreign": torch.zeros(1)}, shards(folder)[1])
    assert_refused(folder, "model-00002.*does not hold the tensors")


def test_a_shard_outside_the_folder_is_refused(originals, folder):
    name = f"../../originals0/b/{shards(folder)[0].name}"

    def point_outside(index):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)

    edit_json(folder / INDEX_FILE, point_outside)
    assert_refused(folder, "must be a .safetensors file in the folder")


def test_a_format_from_the_future_asks_for_an_upgrade(folder):
    edit_json(
        folder / "config.json",
        lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1),
    )
    assert_refused(folder, f"format_version {FORMAT_VERSION + 1}.*upgrade nanoquant")


@pytest.mark.parametrize("version", [None, 0, "1"])
def test_a_format_version_must_be_a_whole_number(folder, version):
    edit_json(
        folder / "config.json", lambda c: c["quantization_config"].update(format_version=version)
    )
    assert_refused(folder, "format_version")


def test_a_dense_checkpoint_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a nanoquant checkpoint.*no quantization_config"):
        load(tmp_path)


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        load(folder)


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json can't be read"):
        load(folder)


def test_a_folder_without_weights_is_refused(folder):
    for file in (*shards(folder), folder / INDEX_FILE):
        file.unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        load(folder)


def test_every_shard_carries_the_id_of_config(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {read_header(f)[1][CHECKPOINT_KEY] for f in shards(folder)} == {config["checkpoint_id"]}


def test_one_tensor_in_two_files_is_refused(folder):
    first, second = shards(folder)[:2]
    name = "model.norm.weight"
    both = [load_file(f) | {name: torch.zeros(64)} for f in (first, second)]
    for tensors, file in zip(both, (first, second), strict=True):
        save_file(tensors, file)
    assert_refused(folder, "model-0000")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/nowhere/at/all", "a/b/c"])
def test_a_name_that_cannot_be_on_the_hub_is_a_missing_folder(name):
    with pytest.raises(ValueError, match="there is no folder"):
        resolve_folder(name)


def test_the_hub_is_asked_for_owner_slash_name_without_other_weights(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, ignore_patterns):
        asked.update(name=name, skipped=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_folder("owner/name") == tmp_path
    assert asked["name"] == "owner/name" and "*.bin" in asked["skipped"]
    assert "*.safetensors" not in asked["skipped"]
    resolve_folder("owner/name", weights=False)
    assert "*.safetensors" in asked["skipped"]


def test_a_name_that_the_hub_does_not_give_is_a_clear_error(monkeypatch):
    def snapshot_download(name, ignore_patterns):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="'owner/name' is not a folder here.*no network"):
        resolve_folder("owner/name")


def test_large_numbers_that_count_nothing_are_no_damage_and_counts_are(tmp_path):
    folder = save_pretrained(
        pack_randomly(tiny_llama()), tmp_path / "out", recipe={"tokens_per_layer": 5000}
    )
    config = json.loads((folder / "config.json").read_text())
    for name, value in {"vocab_size_per_layer_input": 262144, "num_hidden_layers": 10**9}.items():
        (folder / "config.json").write_text(json.dumps(config | {name: value}))
        if name.startswith("vocab"):  # as Gemma 3n has it
            load(folder)
        else:
            with pytest.raises(ValueError, match="num_hidden_layers 1000000000"):
                load(folder)
