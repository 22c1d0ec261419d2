import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_phi
from torch import nn

from nanoquant.architectures import (
    as_linear,
    capture_block_inputs,
    evaluation_mode,
    find_decoder,
    find_skeleton_decoder,
    run_block,
)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.fixture(params=FAMILIES, ids=str)
def model(request):
    return FAMILIES[request.param]()


def test_every_matrix_of_the_blocks_is_a_found_linear(model):
    decoder = find_decoder(model)
    found = sum(module.weight.numel() for module in decoder.linear_modules().values())
    matrices = sum(p.numel() for p in decoder.blocks.parameters() if p.ndim > 1)
    assert found == matrices > 0
    assert len(decoder.blocks) == model.config.num_hidden_layers
    assert hooks(model) == 0


def test_the_decoder_of_a_skeleton_is_that_of_the_model(model):
    decoder = find_decoder(model)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    found = find_skeleton_decoder(skeleton)
    for field in ("path", "linears", "groups"):
        assert getattr(found, field) == getattr(decoder, field)
    assert found.blocks is skeleton.get_submodule(found.path) and hooks(skeleton) == 0


def test_full_names_lead_to_the_modules(model):
    decoder = find_decoder(model)
    for name, module in decoder.linear_modules().items():
        assert model.get_submodule(name) is module


def test_groups_hold_each_linear_once(model):
    decoder = find_decoder(model)
    for names, groups in zip(decoder.linears, decoder.groups, strict=True):
        assert sorted(n for group in groups for n in group) == sorted(names)


def test_order_and_groups_of_a_llama_block_are_those_of_execution():
    groups = find_decoder(tiny_llama()).groups[0]
    q, k, v = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    mlp = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
    assert groups == ((q, k, v), ("self_attn.o_proj",), *mlp)


def test_parallel_mlp_of_phi_shares_the_input_of_attention():
    decoder = find_decoder(tiny_phi())
    assert "mlp.fc1" in decoder.groups[0][0]
    assert decoder.linears[0].index("self_attn.dense") < decoder.linears[0].index("mlp.fc1")


def test_blocks_run_alone_give_what_the_model_gives(model):
    decoder = find_decoder(model)
    windows = random_windows(5, 24)
    hidden, calls = capture_block_inputs(model, decoder, windows, batch_size=2)
    assert hidden.shape == (5, 24, 64)
    last = []
    handle = decoder.blocks[-1].register_forward_hook(lambda m, a, out: last.append(out))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
        for block, call in zip(decoder.blocks, calls, strict=True):
            hidden = run_block(block, hidden, call)
    handle.remove()
    expected = last[0][0] if isinstance(last[0], tuple) else last[0]
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert hooks(model) == 0


def test_capture_works_on_one_window_and_can_be_trained_on():
    model = tiny_llama()
    hidden, calls = capture_block_inputs(model, find_decoder(model), random_windows(1, 8))
    run_block(model.model.layers[0], hidden, calls[0]).sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None


def test_calls_that_depend_on_the_text_are_refused():
    model = tiny_llama()
    inner = model.model.forward

    def with_text(input_ids, **kwargs):
        return inner(input_ids=input_ids, per_layer=input_ids.float(), **kwargs)

    model.model.forward = with_text
    with pytest.raises(ValueError, match="model.layers.0 receives tensors that depend on the text"):
        capture_block_inputs(model, find_decoder(model), random_windows(3, 8))
    assert hooks(model) == 0


def test_capture_leaves_no_hook_after_an_error():
    model = tiny_llama()
    decoder = find_decoder(model)
    with pytest.raises(IndexError):
        capture_block_inputs(model, decoder, torch.full((2, 8), 10_000))
    assert hooks(model) == 0


def test_fused_experts_are_refused_by_name_and_share():
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj \(26\.0%\)"):
        find_decoder(tiny_mixtral())


def test_already_quantized_layers_are_refused():
    model = tiny_llama()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight .*already quantized"):
        find_decoder(model)


def test_a_linear_that_never_runs_is_named():
    model = tiny_llama()
    model.model.layers[0].unused = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"layers\.0\.unused .*never ran"):
        find_decoder(model)
    assert hooks(model) == 0


def test_linears_that_share_a_weight_are_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="share one weight"):
        find_decoder(model)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no decoder blocks in Sequential"):
        find_decoder(nn.Sequential(nn.Linear(4, 4)))


def test_an_encoder_decoder_is_refused():
    model = tiny_llama()
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="LlamaForCausalLM is an encoder-decoder"):
        find_decoder(model)


def test_a_list_of_unlike_modules_is_no_list_of_blocks():
    class Other(nn.Sequential):
        pass

    parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), Other(nn.Linear(4, 4))])
    with pytest.raises(ValueError, match=r"different classes \(Other, Sequential\)"):
        find_decoder(nn.ModuleDict({"parts": parts}))


@pytest.mark.parametrize("tie", [True, False])
def test_linears_outside_the_blocks_are_reported_but_not_the_head(tie, caplog):
    model = tiny_llama(tie=tie)
    find_decoder(model)
    assert caplog.text == ""
    model.tower = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
    model.project_in = nn.Linear(8, 64)
    find_decoder(model)
    assert (
        "project_in (" in caplog.text
        and "tower.0.0 (" in caplog.text
        and "kept dense" in caplog.text
    )
    assert "lm_head" not in caplog.text


def test_conv1d_becomes_an_equal_linear():
    conv = tiny_gpt2().transformer.h[0].mlp.c_fc
    linear = as_linear(conv)
    x = torch.randn(3, 64)
    assert linear.weight.shape == (96, 64) and linear.bias is conv.bias
    torch.testing.assert_close(linear(x), conv(x))
    assert as_linear(linear) is linear
    with pytest.raises(ValueError, match="got LayerNorm"):
        as_linear(nn.LayerNorm(3))


def test_evaluation_mode_restores_every_module():
    model = tiny_llama().train()
    model.model.norm.eval()
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert model.training and not model.model.norm.training
