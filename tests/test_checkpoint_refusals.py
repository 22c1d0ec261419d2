"""What can not be saved or loaded is refused by name, and leaves no files."""

import pytest
import torch
from packed_models import pack_randomly, replace_linears
from tiny_models import tiny_llama

from nanoquant.checkpoint import load, pack_model, save_pretrained


@pytest.fixture(scope="module")
def packed():
    return pack_randomly(tiny_llama())


def test_an_output_folder_with_files_is_refused_and_untouched(packed, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        save_pretrained(packed, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["keep.txt"]


def test_a_failed_save_leaves_no_files(packed, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_pretrained(packed, tmp_path / "out", tokenizer=Tokenizer())
    assert not list((tmp_path / "out").iterdir())


def test_dense_and_latent_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer"):
        save_pretrained(tiny_llama(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"self_attn.q_proj is not packed.*pack_model"):
        save_pretrained(replace_linears(tiny_llama()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_not_finite_is_named(tmp_path):
    model = pack_randomly(tiny_llama())
    model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match="model.norm.weight"):
        save_pretrained(model, tmp_path / "out")
    latent = replace_linears(tiny_llama())
    latent.model.layers[1].mlp.up_proj.s2.data[0] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: s2"):
        pack_model(latent)


def test_a_tensor_of_another_dtype_is_refused_because_loading_would_cast_it(tmp_path):
    model = pack_randomly(tiny_llama(dtype=torch.bfloat16))
    model.model.norm.float()
    with pytest.raises(ValueError, match="model.norm.weight is torch.float32"):
        save_pretrained(model, tmp_path / "out")


def test_a_missing_folder_is_named_with_near_names(tmp_path):
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ValueError, match="no folder.*near names there: tiny"):
        load(tmp_path / "tinny")
