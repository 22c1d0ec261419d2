"""Which kernel a GPU runs; the GPU itself is played by a fake, and by a real one where there is one."""

import logging
import math

import pytest
import torch
from test_kernels_ops import arguments, expected
from test_kernels_product import arguments as looked_up
from test_kernels_product import expected as looked_up_expected

from nanoquant_kernels import (
    binary_low_rank_linear,
    binary_low_rank_linears,
    cards,
    gpu,
    product_linear,
    reference,
    tiles,
)

CARD = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def card(monkeypatch):
    """A card of compute capability 8.6 on which every kernel is the reference."""
    for module in (gpu, cards):
        monkeypatch.setattr(module, "architecture", lambda device: 86)
    monkeypatch.setattr(cards, "missing_triton", lambda: "")
    monkeypatch.setattr(cards, "_verdicts", {})
    monkeypatch.setattr(cards, "_left_out", set())
    monkeypatch.setattr(gpu, "run", lambda plan, *args: reference.binary_low_rank_linear(*args))
    trial = gpu.trial
    monkeypatch.setattr(gpu, "trial", lambda device, *rest: trial("cpu", *rest))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cards.unavailable.cache_clear()
    yield monkeypatch
    cards.unavailable.cache_clear()


def chosen(dtype, tokens, device=CARD):
    return gpu.plan(device, dtype, tokens, 4096, 4096, 2048).kernel


@pytest.mark.parametrize(
    "dtype, tokens, kernel",
    [
        (torch.bfloat16, 1, "flip"),
        (torch.float16, 2, "dot"),
        (torch.bfloat16, 4096, "dot"),
        (torch.float32, 1, "unpack"),
        (torch.float64, 1, "reference"),
    ],
)
def test_the_table_chooses_the_kernel(card, dtype, tokens, kernel):
    assert chosen(dtype, tokens) == kernel


def test_a_kernel_that_is_wrong_here_is_not_used_and_reported_once(card, caplog):
    card.setattr(gpu, "run", lambda plan, *args: 1.1 * reference.binary_low_rank_linear(*args))
    for _ in range(2):
        assert chosen(torch.float16, 1) == "reference"
    assert caplog.text.count("is wrong on cuda:0 (relative error 1.0e-01)") == 1


def test_a_kernel_that_can_not_run_here_is_not_used_and_reported_once(card, caplog):
    def fails(name, *args):
        raise RuntimeError("no such instruction")

    card.setattr(gpu, "run", fails)
    for _ in range(2):
        assert chosen(torch.float16, 100) == "reference"
    assert caplog.text.count("can't run on cuda:0") == 1


def test_linears_that_one_launch_can_not_take_run_alone(card):
    pytest.importorskip("triton")
    for module in (gpu, cards):
        card.setattr(module, "architecture", lambda device: 90)
    x, *rest = arguments(48, 64, 32, lead=(17,), dtype=torch.float16)
    lists = [[value, value] for value in rest]
    assert gpu.plan_stacked(x[:16], *lists).kernel == "stack"
    assert gpu.plan_stacked(x, *lists) is None  # more than 16 tokens
    assert gpu.plan_stacked(x[:16].float(), *lists) is None
    lists[4] = [rest[4], rest[4].float()]  # biases of two dtypes
    assert gpu.plan_stacked(x[:16], *lists) is None
    for module in (gpu, cards):
        card.setattr(module, "architecture", lambda device: 86)
    lists[4] = [rest[4], rest[4]]
    assert gpu.plan_stacked(x[:1], *lists) is None  # its table prefers flips for one token


def test_every_tile_is_tried_before_its_first_use(card):
    tried = []
    card.setattr(
        gpu,
        "run",
        lambda plan, *args: tried.append(plan) or reference.binary_low_rank_linear(*args),
    )
    for tokens in (1, 16, 20, 64, 65, 4096, 30, 4097):
        chosen(torch.bfloat16, tokens)
    assert [(p.kernel, getattr(p.tiles[0], "tokens", 1)) for p in tried] == [
        ("flip", 1),
        ("dot", 16),
        ("dot", 64),
        ("dot", 128),
    ]


def test_nothing_is_tried_while_a_graph_is_captured_and_the_log_says_so(card, caplog):
    card.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        assert chosen(torch.float16, 1) == "reference"
    assert caplog.text.count("run once before capturing") == 1
    card.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chosen(torch.float16, 1) == "flip"


@pytest.mark.parametrize(
    "reason, arch", [("compute capability 7.5 is below 8.0", 75), ("Triton 3.5.1 is too old", 86)]
)
def test_a_card_or_a_triton_that_is_too_old_is_named_once(card, caplog, reason, arch):
    card.setattr(cards, "architecture", lambda device: arch)
    if arch == 86:
        card.setattr(cards, "missing_triton", lambda: "Triton 3.5.1 is too old")
    for _ in range(2):
        assert chosen(torch.float16, 1) == "reference"
    assert caplog.text.count(reason) == 1


def test_an_old_triton_is_recognised(monkeypatch):
    triton = pytest.importorskip("triton")
    assert cards.missing_triton() == ""
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1 is too old, 3.6 or newer is needed" in cards.missing_triton()


def test_the_table_serves_every_architecture_token_count_and_shape():
    for arch in (80, 86, 89, 90, 100, 120, 75):
        for tokens in (1, 2, 16, 17, 64, 65, 10**6):
            name = tiles.kernel_for(arch, tokens)
            for rows, words in ((16, 1), (4096, 256), (28672, 512)):
                tile = tiles.tile_for(arch, name, tokens, rows, words)
                assert isinstance(tile, tiles.KERNELS[name])
                if name == "dot":
                    assert tile.tokens >= min(tokens, 16)


def test_the_nearest_shape_gives_the_tile(monkeypatch):
    def entry(shape, rows):
        tile = {"rows": rows}
        return dict(architecture=80, kernel="dot", tokens=16, shape=shape, tile=tile)

    listed = {"tiles": [entry([1024, 64], 16), entry([8192, 512], 64)]}
    monkeypatch.setattr(tiles, "table", lambda: listed)
    choose = tiles.tile_for.__wrapped__
    assert choose(80, "dot", 1, 1024, 128).rows == 16
    assert choose(80, "dot", 1, 4096, 512).rows == 64


@pytest.fixture
def filled():
    """New tensors hold NaN, so that what no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@needs_gpu
@pytest.mark.parametrize("shape", [(4096, 4096, 2016), (1000, 520, 96), (51, 100, 37)], ids=str)
def test_kernels_on_a_gpu_give_the_dense_product(shape, filled):
    for tokens in (1, 2, 8, 16, 17, 64, 127, 128, 300):
        for dtype, limit in ((torch.bfloat16, 3e-3), (torch.float16, 1e-3)):
            args = arguments(*shape, lead=(tokens,), dtype=dtype)
            truth = expected(*args).cuda()
            args = [a.cuda() if torch.is_tensor(a) else a for a in args]
            for kernel in ("dot", "unpack") + ("flip",) * (tokens == 1):
                y = gpu.run(gpu.Plan(kernel), *args)
                allowed = limit * (2 if kernel == "unpack" else 1)  # it rounds once more
                error = (y.double() - truth).norm() / truth.norm()
                assert error <= allowed, (kernel, tokens, dtype)


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_stacked_linears_on_a_gpu_are_right(tokens, filled):
    shapes = [(512, 512, 288), (128, 512, 96), (128, 512, 96)]
    members = [arguments(*shape, lead=(tokens,), dtype=torch.bfloat16) for shape in shapes]
    x, lists = members[0][0].cuda(), list(zip(*members, strict=True))[1:]
    lists = [[a.cuda() if torch.is_tensor(a) else a for a in group] for group in lists]
    outputs = binary_low_rank_linears(x, *lists)
    for y, (_, *rest) in zip(outputs, members, strict=True):
        truth = expected(members[0][0], *rest).cuda()
        assert (y.double() - truth).norm() <= 3e-3 * truth.norm()


@needs_gpu
@pytest.mark.parametrize("widths", [(8,), (4, 4), (6, 10)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_a_looked_up_weight_on_a_gpu_is_right(tokens, widths, filled):
    args = looked_up(512, 520, 8, widths, 2, lead=(tokens,), dtype=torch.bfloat16)
    y = product_linear(*(a.cuda() if torch.is_tensor(a) else a for a in args))
    truth = looked_up_expected(*args).cuda()
    assert (y.double() - truth).norm() <= 6e-3 * truth.norm()


@needs_gpu
def test_a_cuda_graph_replays_the_operator():
    args = [
        a.cuda() if torch.is_tensor(a) else a
        for a in arguments(1024, 512, 96, lead=(1,), dtype=torch.bfloat16)
    ]
    expected_bits = binary_low_rank_linear(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = binary_low_rank_linear(*args)
    y.fill_(math.nan)
    graph.replay()
    assert torch.equal(y, expected_bits)


@needs_gpu
def test_every_kernel_is_right_on_this_card(caplog):
    with caplog.at_level(logging.WARNING):
        for tokens in (1, 16, 300):
            assert chosen(torch.bfloat16, tokens) != "reference", caplog.text
