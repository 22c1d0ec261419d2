import json

import needs
import pytest
import torch
import transformers
from packed_models import pack_randomly
from safetensors.torch import load_file, save_file
from tiny_models import random_windows, tiny_gpt2, tiny_llama
from torch import nn

from nanoquant.checkpoint import load, save_pretrained
from nanoquant.checkpoint_files import read_header
from nanoquant.hf_quantizer import NanoQuantHfConfig, digest
from nanoquant.packed_layers import packed_modules
from nanoquant.product_budget import ProductShape

FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return save_pretrained(pack_randomly(tiny_llama()), tmp_path / "checkpoint")


def rewrite(folder, change):
    """Change the tensors of the checkpoint, which keeps its id."""
    tensors, (_, metadata) = load_file(folder / FILE), read_header(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata)


def assert_refused(folder, message):
    for read in (load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            read(folder)


@pytest.mark.parametrize("part", ["u_signs", "v_signs", "s1", "s2"])
def test_a_missing_part_of_a_quantized_layer_is_named(folder, part):
    name = f"model.layers.1.mlp.up_proj.{part}"
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert_refused(folder, f"lacks {name}")


@pytest.fixture
def looked_up(tmp_path):
    model = pack_randomly(tiny_llama(), ProductShape(8, (4, 4)))
    return save_pretrained(model, tmp_path / "looked up")


@pytest.mark.parametrize("part", ["indices", "codebook", "indices2", "codebook2", "scale"])
def test_a_missing_part_of_a_looked_up_layer_is_named(looked_up, part):
    name = f"model.layers.1.mlp.up_proj.{part}"
    rewrite(looked_up, lambda tensors: tensors.pop(name))
    assert_refused(looked_up, f"lacks {name}")


@pytest.mark.parametrize(("which", "has"), [(0, "u_signs"), (1, "indices")])
def test_entries_of_the_other_method_are_refused_by_name(folder, looked_up, which, has):
    places = (folder, looked_up)
    configs = [json.loads((place / "config.json").read_text()) for place in places]
    other = configs[1 - which]["quantization_config"]["modules"]
    configs[which]["quantization_config"]["modules"] = other
    (places[which] / "config.json").write_text(json.dumps(configs[which]))
    assert_refused(places[which], f"lacks .* and has .*{has}: it was made by another method")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": []}, "have one stage or a second"),
        ({"widths": [5, 4]}, "indices have .* got 5"),
        ({"slabs": 7}, "7 slabs do not divide"),
        ({"group": 0}, "needs a rank >= 1, or group, widths and slabs"),
        ({"widths": 4}, "needs a rank >= 1, or group, widths and slabs"),
    ],
)
def test_codebooks_that_can_not_be_are_named(looked_up, change, message):
    content = json.loads((looked_up / "config.json").read_text())
    name = "model.layers.0.mlp.down_proj"
    content["quantization_config"]["modules"][name] |= change
    (looked_up / "config.json").write_text(json.dumps(content))
    assert_refused(looked_up, f"{name}.*{message}")


def test_only_codebooks_ask_for_the_newest_format(folder, looked_up):
    for place, version in ((folder, 1), (looked_up, 3)):
        content = json.loads((place / "config.json").read_text())["quantization_config"]
        assert content["format_version"] == version


def test_a_missing_tensor_of_the_rest_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert_refused(folder, "lacks 1 tensors of the model: model.norm.weight")


def test_a_missing_embedding_is_named_though_it_is_tied(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert_refused(folder, "model.embed_tokens.weight")


def test_a_foreign_tensor_is_named_with_its_file(folder):
    rewrite(folder, lambda tensors: tensors.update(stray=torch.zeros(2)))
    assert_refused(folder, f"{FILE} holds tensors .*1 in all.*stray")


def test_a_tensor_of_another_shape_is_named(folder):
    name = "model.layers.0.self_attn.q_proj.u_signs"
    rewrite(folder, lambda t: t.update({name: torch.zeros(64, 5, dtype=torch.uint8)}))
    assert_refused(folder, f"{name} in .*shape .64, 5., but the model asks for U8")


def test_signs_that_are_not_bytes_are_named(folder):
    name = "model.layers.0.self_attn.q_proj.u_signs"
    rewrite(folder, lambda t: t.update({name: t[name].float()}))
    assert_refused(folder, f"{name} in .* is F32")


def test_scales_that_are_not_floats_are_named(folder):
    name = "model.layers.0.self_attn.q_proj.s1"
    rewrite(folder, lambda t: t.update({name: t[name].int()}))
    assert_refused(folder, "scales of model.layers.0.self_attn.q_proj")


def test_a_listed_module_that_is_no_linear_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.norm"] = {"rank": 32}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, "lists model.norm as a quantized linear, but the model has LlamaRMSNorm")


@pytest.mark.parametrize("entry", [{}, {"rank": 0}, {"rank": "32"}, 32])
def test_a_module_without_a_rank_is_named(entry):
    with pytest.raises(ValueError, match="a.b"):
        NanoQuantHfConfig({"a.b": entry})


def test_pickled_weights_are_never_read(folder):
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match="safetensors files only"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="neither model.safetensors"):
        load(folder)


def test_a_dense_model_cannot_be_quantized_by_from_pretrained(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=NanoQuantHfConfig()
        )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_dequantized_model_is_dense_and_computes_the_same(build, tmp_path):
    packed = pack_randomly(build(), scale_dtype=torch.float32)
    dense = load(save_pretrained(packed, tmp_path / "out")).dequantize()
    linears = sum(isinstance(m, nn.Linear) for m in dense.modules())
    assert linears > 4 and not any(hasattr(m, "u_signs") for m in dense.modules())
    windows = random_windows(2, 16)
    torch.testing.assert_close(dense(windows).logits, packed(windows).logits, rtol=1e-4, atol=1e-4)


def test_the_id_depends_on_every_value():
    model = pack_randomly(tiny_llama())
    before = digest(model)
    assert digest(model) == before
    model.model.layers[0].mlp.up_proj.u_signs.data[0, 0] ^= 1
    assert digest(model) != before


def test_a_trained_scale_is_saved_under_a_new_id(folder, tmp_path):
    model = load(folder)
    old = model.config.quantization_config.checkpoint_id
    model.model.layers[0].mlp.up_proj.s1.data *= 2
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.quantization_config.checkpoint_id != old
    scale = again.model.layers[0].mlp.up_proj.s1
    assert torch.equal(scale, model.model.layers[0].mlp.up_proj.s1)


class Graphs(list):
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph

    def calls(self, target):
        return sum(node.target is target for graph in self for node in graph.graph.nodes)


OPERATOR = torch.ops.nanoquant.binary_low_rank_linear.default


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_torch_compile_of_a_loaded_model_is_one_graph_with_the_operator_of_every_layer(
    build, tmp_path
):
    model = load(save_pretrained(pack_randomly(build()), tmp_path / "out"))
    windows, graphs = random_windows(2, 8), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        expected = model(input_ids=windows, use_cache=False).logits
        assert torch.equal(compiled(input_ids=windows, use_cache=False).logits, expected)
    assert len(graphs) == 1
    assert graphs.calls(OPERATOR) == len(model.config.quantization_config.modules) > 0


def test_a_decode_step_over_a_static_cache_is_one_graph(folder):
    model, graphs = load(folder), Graphs()
    compiled = torch.compile(model.__call__, fullgraph=True, backend=graphs)
    windows = random_windows(1, 6)
    with torch.no_grad():
        expected = model(input_ids=windows).logits[:, -1]
        cache = transformers.StaticCache(model.config, 16)
        model(input_ids=windows[:, :4], past_key_values=cache)
        for at in (4, 5):
            positions = torch.tensor([[at]])
            mask = (torch.arange(16) <= at).view(1, 1, 1, 16)
            logits = compiled(
                input_ids=windows[:, at : at + 1],
                past_key_values=cache,
                position_ids=positions,
                attention_mask=mask,
            ).logits
    assert len(graphs) == 1 and graphs.calls(OPERATOR) == len(packed_modules(model))
    torch.testing.assert_close(logits[:, -1], expected)


@needs.compiler
def test_a_model_compiled_by_inductor_gives_the_same_logits_and_still_generates(tmp_path):
    model = load(save_pretrained(pack_randomly(tiny_llama(layers=1)), tmp_path / "out"))
    windows = random_windows(2, 8)
    with torch.no_grad():
        expected = model(input_ids=windows, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        logits = compiled(input_ids=windows, use_cache=False).logits
        torch.testing.assert_close(logits, expected)
        assert torch.equal(
            compiled.generate(windows, max_new_tokens=4, do_sample=False),
            model.generate(windows, max_new_tokens=4, do_sample=False),
        )
