"""Linears that read the same tensor share launches and give the same results."""

import copy
import sys
import threading

import needs
import pytest
import torch
from packed_models import pack_randomly, random_factors
from tiny_models import tiny_llama

from nanoquant import shared_launch
from nanoquant.packed_linear import PackedBinaryLinear
from nanoquant.shared_launch import (
    SharedLaunch,
    prepare_for_decoding,
    share_launches,
    version_of,
)
from nanoquant_kernels import binary_low_rank_linears

TOKENS = torch.tensor([[5, 3, 9, 2]])


def packed(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedBinaryLinear)}


@pytest.fixture
def calls(monkeypatch):
    """Numbers of members of each shared launch."""
    counts = []

    def counted(x, *lists):
        counts.append(len(lists[0]))
        return binary_low_rank_linears(x, *lists)

    monkeypatch.setattr(shared_launch, "binary_low_rank_linears", counted)
    return counts


@pytest.fixture
def model():
    return pack_randomly(tiny_llama())


@torch.no_grad()
def test_qkv_and_gate_up_share_launches_and_logits_stay_the_same(model, calls):
    before = model(TOKENS).logits
    share_launches(model, packed(model))
    assert torch.equal(model(TOKENS).logits, before)
    assert calls == [3, 2] * len(model.model.layers)


@torch.no_grad()
def test_many_tokens_and_training_run_alone(model, calls):
    share_launches(model, packed(model))
    model(TOKENS.repeat(1, 5))
    with torch.enable_grad():
        model(TOKENS)
    assert calls == []


@torch.no_grad()
def test_a_copy_of_a_model_shares_among_its_own_layers(model, calls):
    share_launches(model, packed(model))
    twin = copy.deepcopy(model)
    for layer in packed(model).values():
        layer.s1.zero_()
    before = twin(TOKENS).logits
    assert before.abs().max() > 0 and calls
    for layer in packed(twin).values():
        layer.shared = None
    assert torch.equal(twin(TOKENS).logits, before)


def members():
    layers = [
        PackedBinaryLinear.from_factors(random_factors(d_out, 64, 32, seed=d_out))
        for d_out in (32, 48, 40)
    ]
    launch = SharedLaunch(layers)
    for layer in layers:
        layer.shared = launch
    return layers


def alone(layer, x):
    twin = copy.copy(layer)
    twin.shared = None
    return twin(x)


@torch.no_grad()
def test_any_order_and_any_x_give_what_each_gives_alone():
    layers = members()
    x, other = torch.randn(2, 1, 64, generator=torch.manual_seed(0))
    for index, given in ((2, x), (0, x), (0, x), (1, other), (1, x), (2, x), (0, other)):
        assert torch.equal(layers[index](given), alone(layers[index], given))


@torch.no_grad()
def test_a_tensor_that_was_written_to_is_read_again():
    layers = members()
    x = torch.randn(1, 64, generator=torch.manual_seed(0))
    layers[0](x)
    x.zero_()
    assert not layers[1](x).any()


@torch.no_grad()
def test_a_mere_copy_of_a_member_runs_alone():
    layers = members()
    twin, x = copy.copy(layers[1]), torch.randn(1, 64)
    assert torch.equal(twin(x), alone(layers[1], x))


@torch.no_grad()
def test_shared_launches_work_under_autocast():
    layers = members()
    x = torch.randn(1, 64, generator=torch.manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        together = [layer(x) for layer in layers]
        separate = [alone(layer, x) for layer in layers]
    for y, truth in zip(together, separate, strict=True):
        assert y.dtype == torch.bfloat16 and torch.equal(y, truth)


def test_what_shared_launches_do_not_take_is_refused():
    layers = members()
    lists = [
        [getattr(m, n) for m in layers] for n in ("u_signs", "v_signs", "s1", "s2", "bias", "rank")
    ]
    x = torch.randn(1, 64)
    with pytest.raises(ValueError, match="as many of everything"):
        binary_low_rank_linears(x, lists[0][:1], *lists[1:])
    with pytest.raises(ValueError, match="no gradients"):
        binary_low_rank_linears(x.requires_grad_(), *lists)


@torch.no_grad()
def test_the_shared_operator_passes_opcheck():
    layers = members()
    lists = [
        [getattr(m, n) for m in layers] for n in ("u_signs", "v_signs", "s1", "s2", "bias", "rank")
    ]
    operator = torch.ops.nanoquant.binary_low_rank_linears.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (torch.randn(2, 64), *lists), test_utils=tests)


@torch.no_grad()
def test_nothing_is_held_once_every_member_was_asked():
    layers = members()
    x = torch.randn(1, 64)
    for layer in layers:
        layer(x)
    launch = layers[0].shared
    assert launch.held is None


@torch.no_grad()
@pytest.mark.parametrize("same", [False, True], ids=["another x", "the same x"])
def test_a_thread_that_comes_between_gets_its_own_and_takes_nothing(same, monkeypatch):
    layers = members()
    x, other = torch.randn(2, 1, 64, generator=torch.manual_seed(0))
    other = x if same else other
    found, theirs = [layers[0](x)], []

    def interrupted(x):
        monkeypatch.undo()
        thread = threading.Thread(target=torch.no_grad()(lambda: theirs.append(layers[0](other))))
        thread.start()
        thread.join()
        return version_of(x)

    monkeypatch.setattr(shared_launch, "version_of", interrupted)
    found += [layer(x) for layer in layers[1:]]
    theirs += [layer(other) for layer in layers[1:]]
    for given, ys in ((x, found), (other, theirs)):
        assert all(map(torch.equal, ys, [alone(layer, given) for layer in layers]))


def test_threads_that_share_a_model_get_their_own():
    layers = members()
    wrong = []

    @torch.no_grad()
    def decode(seed):
        for x in torch.randn(100, 1, 64, generator=torch.Generator().manual_seed(seed)):
            wrong.extend(not torch.equal(layer(x), alone(layer, x)) for layer in layers)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(wrong) == 4 * 100 * 3 and not any(wrong)


def test_layers_that_are_not_on_a_gpu_stay_as_they_are(model):
    prepare_for_decoding(model)
    assert all(layer.shared is None for layer in packed(model).values())


@torch.no_grad()
def test_aligned_rows_change_no_value_and_no_result():
    layer = PackedBinaryLinear.from_factors(random_factors(40, 72, 40))
    x = torch.randn(3, 72, generator=torch.manual_seed(0))
    before, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.align_rows_()
    places = layer.u_signs.data_ptr(), layer.v_signs.data_ptr()
    layer.align_rows_()
    assert places == (layer.u_signs.data_ptr(), layer.v_signs.data_ptr())  # once is enough
    assert layer.u_signs.stride(0) % 16 == 0 and layer.v_signs.stride(0) % 16 == 0
    assert torch.equal(layer(x), before)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@needs.compiler
@torch.no_grad()
def test_shared_launches_compile_as_one_graph(calls):
    torch.compiler.reset()  # other tests of this process may have used up the limit of variants
    model = pack_randomly(tiny_llama())
    before = model(TOKENS, use_cache=False).logits
    share_launches(model, packed(model))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, before)
