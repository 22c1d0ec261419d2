import functools

import pytest
import torch
from tiny_models import random_windows, tiny_gpt2, tiny_llama
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanoquant.architectures import find_decoder
from nanoquant.calibration import collect_importances
from nanoquant.importance import (
    ImportanceCollector,
    ImportanceConfig,
    cross_entropy_gradient,
)
from nanoquant.second_moment import (
    SecondMoment,
    clip_threshold,
    clip_tokens,
    eigenvectors,
    shrink,
)

PLAIN = ImportanceConfig(shrinkage=0.0, clip_quantile=None)


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def normalised(moment):
    return moment / moment.mean()


def direct_moments(model, name, windows):
    """Mean squared input and output gradient of one linear, by autograd alone."""
    seen = {}

    def note(module, args, output):
        output.retain_grad()
        seen["x"], seen["y"] = args[0], output

    handle = model.get_submodule(name).register_forward_hook(note)
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    x, g = seen["x"].detach(), seen["y"].grad
    return x.flatten(0, 1).square().mean(0), g.flatten(0, 1).square().mean(0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_importances_equal_direct_autograd(build):
    model = build(dtype=torch.float64)
    windows = random_windows(6, 16)
    linears = find_decoder(model).linear_modules()
    found = collect_importances(model, find_decoder(model), windows, PLAIN, batch_size=2)
    for name in linears:
        x, g = direct_moments(model, name, windows)
        torch.testing.assert_close(found[name].input.double(), normalised(x), rtol=1e-5, atol=0)
        torch.testing.assert_close(found[name].output.double(), normalised(g), rtol=1e-5, atol=0)
        assert found[name].scale == pytest.approx(float(x.mean() * g.mean()), rel=1e-5)


def test_batch_size_does_not_matter_without_clipping():
    model, windows = tiny_llama(), random_windows(4, 16)
    linears = find_decoder(model).linear_modules()
    one = collect_importances(model, find_decoder(model), windows, PLAIN, batch_size=1)
    two = collect_importances(model, find_decoder(model), windows, PLAIN, batch_size=4)
    for name in linears:
        torch.testing.assert_close(one[name].output, two[name].output, rtol=1e-4, atol=1e-6)


def test_gradient_of_the_loss_equals_autograd():
    logits = torch.randn(2, 700, 11, dtype=torch.float32, requires_grad=True)
    ids = torch.randint(0, 11, (2, 700))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(cross_entropy_gradient(logits.detach(), ids), logits.grad)


def test_bfloat16_importances_are_close_to_float32():
    windows = random_windows(4, 16)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(
            dtype
        )  # the same weights, which a generator of either dtype need not give
        found[dtype] = collect_importances(model, find_decoder(model), windows, ImportanceConfig())
    for name, exact in found[torch.float32].items():
        rounded = found[torch.bfloat16][name]
        assert rounded.output.dtype == torch.float32
        error = (rounded.output - exact.output).norm() / exact.output.norm()
        assert error < 0.1, name


def test_importances_have_mean_one_and_are_positive():
    model = tiny_llama()
    config = ImportanceConfig()
    for importance in collect_importances(
        model, find_decoder(model), random_windows(2, 16), config
    ).values():
        for value in (importance.input, importance.output):
            assert value.mean().item() == pytest.approx(1, abs=1e-5) and (value > 0).all()


def test_each_setting_changes_the_importances():
    model, windows = tiny_llama(), random_windows(4, 16)
    linears = find_decoder(model).linear_modules()
    base = collect_importances(model, find_decoder(model), windows, ImportanceConfig())
    for config in (ImportanceConfig(shrinkage=0.6), ImportanceConfig(clip_quantile=0.5)):
        other = collect_importances(model, find_decoder(model), windows, config)
        assert all(not torch.equal(base[n].output, other[n].output) for n in linears)


def test_model_is_left_as_it_was():
    model = tiny_llama().train()
    model.model.norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    collect_importances(model, find_decoder(model), random_windows(3, 8), PLAIN, 2)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training and hooks(model) == 0


def test_model_is_left_as_it_was_after_an_error():
    model = tiny_llama()
    with pytest.raises(IndexError):
        collect_importances(model, find_decoder(model), torch.full((2, 8), 10_000), PLAIN)
    assert all(p.requires_grad for p in model.parameters()) and hooks(model) == 0


def test_importances_can_be_collected_under_no_grad():
    model, windows = tiny_llama(), random_windows(2, 8)
    with torch.no_grad():
        collect_importances(model, find_decoder(model), windows, PLAIN)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(bad):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = bad
    message = r"input activations of model\.layers\.1\.mlp\.gate_proj are not finite"
    with pytest.raises(ValueError, match=message):
        collect_importances(model, find_decoder(model), random_windows(1, 8), PLAIN)
    assert hooks(model) == 0


def test_gradients_that_are_not_finite_name_the_layer():
    model = tiny_llama(tie=False)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    message = r"output gradients of model\.layers\.1\.mlp\.down_proj are not finite"
    with pytest.raises(ValueError, match=message):
        collect_importances(model, find_decoder(model), random_windows(1, 8), PLAIN)
    assert hooks(model) == 0 and all(p.requires_grad for p in model.parameters())


def test_zero_gradients_name_the_layer():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    message = r"output gradients of model\.layers\.0\.self_attn\.\w_proj are all zero"
    with pytest.raises(ValueError, match=message):
        collect_importances(model, find_decoder(model), random_windows(1, 8), PLAIN)


def test_a_layer_without_statistics_is_named():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"never\.run has no statistics of its input activations"):
        ImportanceCollector({"never.run": nn.Linear(2, 2)}, PLAIN).importances()
    for passes, what in ((torch.no_grad, "input activations"), (torch.enable_grad, "output grad")):
        with ImportanceCollector({"head": model.lm_head}, PLAIN) as collector, passes():
            model(input_ids=random_windows(1, 8))  # no backward pass
        with pytest.raises(ValueError, match=f"head has no statistics of its {what}"):
            collector.importances()


def test_collector_serves_a_loop_of_the_caller():
    model, ids = tiny_llama(), random_windows(2, 8)
    linears = find_decoder(model).linear_modules()
    with ImportanceCollector(linears, PLAIN) as collector:
        model(input_ids=ids, labels=ids).loss.backward()
    expected = collect_importances(model, find_decoder(model), ids, PLAIN, batch_size=2)
    for name, importance in collector.importances().items():
        torch.testing.assert_close(importance.output, expected[name].output, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_importances():
    model, ids = tiny_llama(), random_windows(2, 8)
    linears = find_decoder(model).linear_modules()
    expected = collect_importances(model, find_decoder(model), ids, PLAIN)
    for block in model.model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    with ImportanceCollector(linears, PLAIN) as collector:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, importance in collector.importances().items():
        torch.testing.assert_close(importance.input, expected[name].input, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(importance.output, expected[name].output, rtol=1e-4, atol=1e-6)


def test_threshold_is_the_kth_largest_norm():
    norms = torch.arange(1.0, 2001.0)[torch.randperm(2000)]
    assert clip_threshold(norms, 0.999) == 1999
    assert clip_threshold(norms, 0.9999) == 2000
    assert clip_threshold(norms, 0.5) == 1001


def test_clipping_scales_only_long_tokens():
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(clip_tokens(z, 1.0), expected)


def test_shrinkage_keeps_the_mean_and_narrows():
    moment = torch.tensor([1.0, 3.0, 8.0])
    torch.testing.assert_close(shrink(moment, 0.25), torch.tensor([1.75, 3.25, 7.0]))
    assert torch.equal(shrink(moment, 1.0), torch.full((3,), 4.0))


def test_threshold_grows_and_rescales_earlier_sums():
    small, large = torch.randn(10, 4), 10 * torch.randn(10, 4)
    taus = [clip_threshold(z.norm(dim=1), 0.8) for z in (small, large)]
    clipped = [
        clip_tokens(z, tau).square().sum(0) for z, tau in zip((small, large), taus, strict=True)
    ]
    moment = SecondMoment(quantile=0.8)
    moment.update(small)
    moment.update(large)
    expected = (clipped[0] * (taus[1] / taus[0]) ** 2 + clipped[1]) / 20
    torch.testing.assert_close(moment.value(), expected)
    moment.update(small)
    expected = (expected * 20 + small.square().sum(0)) / 30
    torch.testing.assert_close(moment.value(), expected)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="shrinkage is 1.5"):
        ImportanceConfig(shrinkage=1.5)
    with pytest.raises(ValueError, match="clip_quantile is 1"):
        ImportanceConfig(clip_quantile=1)
    assert ImportanceConfig(clip_quantile=0).clip_quantile == 0


def test_an_update_without_tokens_changes_nothing():
    moment, other = SecondMoment(quantile=0.8), SecondMoment(quantile=0.8)
    z = torch.randn(10, 4)
    for update in (z[:0], z, z[:0]):
        moment.update(update)
    other.update(z)
    assert torch.equal(moment.value(), other.value()) and moment.tokens == 10


def test_a_dead_channel_without_shrinkage_names_layer_and_setting():
    linear = nn.Linear(4, 4)
    x = torch.randn(8, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    with ImportanceCollector({"body": linear}, ImportanceConfig(shrinkage=0)) as collector:
        linear(x).square().sum().backward()
    message = r"activations of body are zero in 2 of 4 channels, which importance.shrinkage=0"
    with pytest.raises(ValueError, match=message):
        collector.importances()


def test_eigenvectors_come_from_float64_where_float32_fails(monkeypatch):
    eigh, A = torch.linalg.eigh, torch.randn(6, 6)
    A = A @ A.T

    def failing(M):
        if M.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return eigh(M)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, Q = eigenvectors(A)
    assert values.dtype == Q.dtype == torch.float32
    torch.testing.assert_close(Q * values @ Q.T, A, rtol=1e-4, atol=1e-4)
