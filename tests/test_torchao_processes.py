"""Two processes that divide packed weights, by rows, columns or FSDP2, give what one gives with all of them."""

import launch
import pytest
import torch
import two_packed
from two_packed import KINDS, build, computed

ROUNDING = 1e-6
"""Largest difference as a share of the largest value, where sums over columns are added in another order."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes has computed."""
    folder = tmp_path_factory.mktemp("two")
    return launch.two(two_packed.__file__, folder)


def worst(found, truth):
    """Largest difference as a share of the largest value, of output and gradient."""
    pairs = [(found[name].double(), truth[name].double()) for name in truth]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("how", ["own", "sent"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel_layers_give_what_whole_ones_give(both, kind, how):
    model = build(KINDS[kind])
    dense, name = (
        [model[i].weight.dequantize() for i in (0, 2)],
        type(model[0].weight.data).__name__,
    )
    for rank, found in enumerate(both):
        found = found[kind][how]
        assert found["held"] == [(name, (64, 64)), (name, (48, 64))]
        mine = slice(64 * rank, 64 * rank + 64)
        assert torch.equal(found["dense"][0], dense[0][mine])
        assert torch.equal(found["dense"][1], dense[1][:, mine])
        assert worst(found, computed(model)) <= ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_divides_packed_weights_by_rows_and_gives_the_same_bits(both, kind):
    model = build(KINDS[kind])
    truth, name = computed(model), type(model[0].weight.data).__name__
    for found in both:
        found = found[kind]["fsdp"]
        assert found["held"] == {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (24, 128)}
        assert found["kinds"] == {"0.weight": name, "0.bias": "Tensor", "2.weight": name}
        for run in found["runs"]:  # before and after another, and of a state that was loaded
            assert all(torch.equal(run[what], truth[what]) for what in truth)


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_divides_the_plain_tensors_of_packed_layers(both, kind):
    truth = computed(build(KINDS[kind]))
    for found in both:
        found = found[kind]["packed"]
        assert set(found["kinds"].values()) == {"Tensor"} and "0.weight" not in found["kinds"]
        for run in found["runs"]:
            assert all(torch.equal(run[what], truth[what]) for what in truth)
    names = both[0][kind]["packed"]["held"]
    rows = [sum(found[kind]["packed"]["held"][name][0] for found in both) for name in names]
    layer = two_packed.pack_model(build(KINDS[kind]))
    assert rows == [len(parameter) for parameter in layer.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_computes_in_the_dtype_of_its_policy(both, kind):
    truth = computed(build(KINDS[kind]))
    found = both[0][kind]["bfloat16"]["runs"][1]
    assert found["output"].dtype == torch.bfloat16 and worst(found, truth) < 0.05


def test_what_cannot_be_divided_is_refused_alike_in_both_processes(both):
    for found in both:
        refused = found["refused"]
        assert "got columns 0:20" in refused["columns"] and "multiples of 8" in refused["columns"]
        assert refused["uneven"].startswith("ValueError: got zeros of shape (64, 64)")
        assert "nanoquant.pack_model(model)" in refused["uneven"]
        assert "dequantize() for anything else" in refused["whole"]


def test_packed_layers_may_be_divided_unevenly(both):
    held = [found["uneven packed"]["held"]["0.u_signs"] for found in both]
    assert held == [(64, 3), (63, 3)]
    truth = computed(build(24, 127))
    for found in both:
        for run in found["uneven packed"]["runs"]:
            assert all(torch.equal(run[what], truth[what]) for what in truth)
