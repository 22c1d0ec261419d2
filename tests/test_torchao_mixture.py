"""FqnToConfig mixtures: binary here, int4 and int8 of torchao there, dense elsewhere."""

import dataclasses
import io
from collections import OrderedDict

import pytest
import torch
from test_transform import CONFIG, CONVERT, PREPARE, WINDOWS
from tiny_models import tiny_llama
from torch import nn
from torchao.quantization import (
    FqnToConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

from nanoquant.budget import BudgetConfig
from nanoquant.checkpoint import pack_model, save_pretrained
from nanoquant.packed_tensor import PackedBinaryTensor
from nanoquant.transform import ObservedLinear

INT8 = Int8WeightOnlyConfig()
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
SKIPPED = "model.layers.1.mlp.up_proj"
MORE = dataclasses.replace(CONFIG, budget=BudgetConfig(bits=2.0, rank_multiple=8))


def table(**entries):
    return FqnToConfig(OrderedDict(entries))


def kinds(model):
    """What the weight of each linear has become, by full name."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: type(m.weight.data).__name__ for name, m in linears.items()}


def test_each_name_gets_what_the_table_says_and_the_rest_stays_dense():
    model = tiny_llama(tie=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    entries = {
        SKIPPED: None,
        "model.layers.0.self_attn.q_proj": MORE,
        "model.layers.0.self_attn.k_proj.weight": CONFIG,
        "model.layers.0.mlp.down_proj": INT4,
        r"re:model\.layers\.\d+\.mlp\..*_proj": CONFIG,
        r"re:.*\.1\.self_attn\.[qk]_proj\.weight": INT8,
    }
    quantize_(model, table(**entries), filter_fn=None)

    def expected(name):
        if name == SKIPPED:
            return "Tensor"
        if name == "model.layers.0.mlp.down_proj":
            return "IntxUnpackedToInt8Tensor"
        if "mlp" in name or "0.self_attn.q" in name or "0.self_attn.k" in name:
            return "PackedBinaryTensor"
        return "Int8Tensor" if ".1.self_attn" in name and name[-6] in "qk" else "Tensor"

    found = kinds(model)
    assert found == {name: expected(name) for name in found}
    assert set(found.values()) == {
        "Tensor",
        "PackedBinaryTensor",
        "IntxUnpackedToInt8Tensor",
        "Int8Tensor",
    }
    for name, parameter in model.named_parameters():
        if type(parameter.data) is torch.Tensor:
            assert torch.equal(parameter, before[name]), name
    first, second = (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj)
    assert second.weight.bits <= 1.5 * second.weight.numel()
    assert 1.5 * first.weight.numel() < first.weight.bits <= 2.0 * first.weight.numel()
    with torch.no_grad():
        assert model(input_ids=WINDOWS).logits.isfinite().all()


def test_a_mixture_gives_a_linear_the_same_signs_as_a_call_of_its_own():
    one, other = tiny_llama(), tiny_llama()
    quantize_(one, table(**{r"re:.*\.0\.mlp\.up_proj": CONFIG, "lm_head": INT8}), filter_fn=None)
    quantize_(other, CONFIG, filter_fn=lambda module, name: name.endswith("0.mlp.up_proj"))
    signs = [model.model.layers[0].mlp.up_proj.weight.u_signs for model in (one, other)]
    assert torch.equal(*signs)


def test_two_steps_go_through_a_table_and_other_methods_come_with_the_second():
    model, names = tiny_llama(), r"re:model\.layers\.0\.mlp\..*_proj"
    quantize_(model, table(**{names: PREPARE}), filter_fn=None)
    observed = [n for n, m in model.named_modules() if isinstance(m, ObservedLinear)]
    assert len(observed) == 3 and all("0.mlp" in name for name in observed)
    model(input_ids=WINDOWS).logits.square().sum().backward()
    entries = {names: CONVERT, r"re:model\.layers\.1\.mlp\..*_proj": INT8}
    quantize_(model, table(**entries), filter_fn=None)
    assert all(isinstance(model.get_submodule(n).weight, PackedBinaryTensor) for n in observed)
    found = kinds(model)
    assert {found[n.replace(".0.", ".1.")] for n in observed} == {"Int8Tensor"}
    assert sum(kind != "Tensor" for kind in found.values()) == 6


def test_a_pattern_that_matches_a_bias_is_refused_by_name():
    model = nn.ModuleDict({"a": nn.Linear(64, 96)})
    with pytest.raises(ValueError, match=r"'bias' of a Linear, but the weights .* 're:"):
        quantize_(model, table(**{"re:a.*": CONFIG}), filter_fn=None)


def test_a_pattern_that_matches_what_is_no_linear_is_refused_by_name():
    model = nn.ModuleDict({"a": nn.Linear(64, 96), "norm": nn.LayerNorm(64)})
    with pytest.raises(ValueError, match="LayerNorm"):
        quantize_(model, table(**{r"re:.*\.weight": CONFIG}), filter_fn=None)


def mixed():
    model = tiny_llama(tie=False)
    entries = {r"re:.*\.mlp\..*_proj": CONFIG, r"re:.*\.q_proj": INT8, r"re:.*\.k_proj": INT4}
    quantize_(model, table(**entries), filter_fn=None)
    return model


def test_a_mixture_is_kept_by_its_state_and_loaded_without_code():
    model, buffer = mixed(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = tiny_llama(tie=False)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    with torch.no_grad():
        logits = [m(input_ids=WINDOWS).logits for m in (model, fresh)]
    assert torch.equal(*logits) and kinds(model) == kinds(fresh)


def test_a_checkpoint_of_a_mixture_is_refused_with_what_to_do_instead(tmp_path):
    model = pack_model(mixed())
    with pytest.raises(ValueError, match=r"q_proj.weight is a Int8Tensor of torchao.*state_dict"):
        save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
