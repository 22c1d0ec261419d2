"""Shapes of published models are those of the models, and bad names are refused."""

import json

import pytest
from tiny_models import FAMILIES

from nanoquant.benchmark.linears import Linear, distinct_linears
from nanoquant.benchmark.shapes import (
    CONFIGS,
    linear_shapes,
    model_config,
    ranks_at,
    skeleton,
)
from nanoquant.budget import body_bits

PUBLISHED = {
    "llama-2-7b": (6_738_415_616, 6_476_005_376, 7 * 32),
    "llama-2-70b": (68_976_648_192, 68_451_041_280, 7 * 80),
    "qwen3-8b": (8_190_735_360, 6_945_767_424, 7 * 36),
    "demo": (134_515_008, 106_168_320, 7 * 30),
}
"""Parameters of the model as published, weights of its linears, number of linears."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_parameters(name):
    model = skeleton(model_config(name))
    shapes = linear_shapes(model)
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    assert (model.num_parameters(), weights, len(shapes)) == PUBLISHED[name]


def test_every_model_is_held_to_its_published_parameters():
    assert PUBLISHED.keys() == CONFIGS.keys()


def test_distinct_linears_of_llama_2_70b_share_keys_and_values():
    shapes = linear_shapes(skeleton(model_config("llama-2-70b", layers=2)))
    ranks = ranks_at(shapes, 1.0)
    found = distinct_linears({name: Linear(*shapes[name], ranks[name]) for name in shapes})
    assert {(one.d_out, one.d_in): kinds for one, kinds in found.items()} == {
        (8192, 8192): "q_proj, o_proj",
        (1024, 8192): "k_proj, v_proj",
        (28672, 8192): "gate_proj, up_proj",
        (8192, 28672): "down_proj",
    }


@pytest.mark.parametrize("bits", [2.0, 1.0, 0.8, 0.55])
def test_ranks_keep_to_the_budget(bits):
    shapes = linear_shapes(skeleton(model_config("demo")))
    assert bits - 0.001 < body_bits(shapes, ranks_at(shapes, bits)) <= bits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_config_of_any_family_gives_the_shapes_of_its_model(family, tmp_path):
    model = FAMILIES[family]()
    model.config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        found = linear_shapes(skeleton(model_config(str(name))))
        assert found == linear_shapes(model)
        assert {tuple(sorted(s)) for s in found.values()} <= {
            tuple(sorted(p.shape)) for p in model.parameters()
        }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_layers_cut_the_depth(family, tmp_path):
    FAMILIES[family]().config.save_pretrained(tmp_path)
    whole, cut = (
        linear_shapes(skeleton(model_config(str(tmp_path), layers))) for layers in (None, 1)
    )
    assert cut == dict(list(whole.items())[: len(cut)]) and len(whole) in (
        2 * len(cut),
        3 * len(cut),
    )


@pytest.mark.parametrize("layers", [0, -1, 33])
def test_layers_that_the_model_does_not_have_are_refused(layers):
    with pytest.raises(ValueError, match=f"1 to 32, the layers of llama-2-7b, got {layers}"):
        model_config("llama-2-7b", layers)


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="no model 'llama-3'.*llama-2-7b, llama-2-70b"):
        model_config("llama-3")
    with pytest.raises(ValueError, match=r"'Qwen-3-8B' \(near: qwen3-8b\)"):
        model_config("Qwen-3-8B")
    with pytest.raises(ValueError, match="config.json; give one of"):
        model_config(str(tmp_path))


@pytest.mark.parametrize("values", [{}, {"model_type": "novel"}, {"model_type": "llame"}])
def test_a_config_of_no_known_model_is_refused(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="no configuration that transformers knows"):
        model_config(str(tmp_path))


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_config_of_no_causal_language_model_is_refused_in_few_words(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"^{kind} is no causal language model.{{,50}}$"):
        skeleton(model_config(str(tmp_path)))
