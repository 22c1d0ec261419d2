"""Which kernel a GPU runs; the GPU itself is played by a fake, and by a real one where there is one."""

import logging
import math

import pytest
import torch
from test_kernels_ops import arguments, expected

from nanoquant_kernels import binary_low_rank_linear, cards, gpu, reference, tiles

CARD = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def card(monkeypatch):
    """A card of compute capability 8.6 on which every kernel is the reference."""
    for module in (gpu, cards):
        monkeypatch.setattr(module, "architecture", lambda device: 86)
    monkeypatch.setattr(cards, "missing_triton", lambda: "")
    monkeypatch.setattr(cards, "_verdicts", {})
    monkeypatch.setattr(gpu, "run", lambda name, *args: reference.binary_low_rank_linear(*args))
    trial = gpu.trial
    monkeypatch.setattr(gpu, "trial", lambda device, *rest: trial("cpu", *rest))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cards.unavailable.cache_clear()
    yield monkeypatch
    cards.unavailable.cache_clear()


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
    assert gpu.choose(CARD, dtype, tokens) == kernel


def test_a_kernel_that_is_wrong_here_is_not_used_and_reported_once(card, caplog):
    card.setattr(gpu, "run", lambda name, *args: 1.1 * reference.binary_low_rank_linear(*args))
    for _ in range(2):
        assert gpu.choose(CARD, torch.float16, 1) == "reference"
    assert (
        caplog.text.count(
            "kernel flip, torch.float16, 1 tokens is wrong on cuda:0 (relative error 1.0e-01)"
        )
        == 1
    )


def test_a_kernel_that_can_not_run_here_is_not_used_and_reported_once(card, caplog):
    def fails(name, *args):
        raise RuntimeError("no such instruction")

    card.setattr(gpu, "run", fails)
    for _ in range(2):
        assert gpu.choose(CARD, torch.float16, 100) == "reference"
    assert caplog.text.count("kernel dot, torch.float16, 70 tokens can't run on cuda:0") == 1


def test_more_tokens_than_a_shared_launch_takes_run_alone(card):
    pytest.importorskip("triton")
    x, *rest = arguments(48, 64, 32, lead=(17,), dtype=torch.float16)
    lists = [[value, value] for value in rest]
    assert not gpu.can_stack(x, *lists)
    card.setattr(gpu, "run", lambda name, *args: reference.binary_low_rank_linear(*args))
    assert gpu.can_stack(x[:16], *lists)


def test_nothing_is_tried_while_a_graph_is_captured(card):
    card.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.choose(CARD, torch.float16, 1) == "reference"
    card.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu.choose(CARD, torch.float16, 1) == "flip"


@pytest.mark.parametrize(
    "reason, arch", [("compute capability 7.5 is below 8.0", 75), ("Triton 3.5.1 is too old", 86)]
)
def test_a_card_or_a_triton_that_is_too_old_is_named_once(card, caplog, reason, arch):
    card.setattr(cards, "architecture", lambda device: arch)
    if arch == 86:
        card.setattr(cards, "missing_triton", lambda: "Triton 3.5.1 is too old")
    for _ in range(2):
        assert gpu.choose(CARD, torch.float16, 1) == "reference"
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


@needs_gpu
@pytest.mark.parametrize("shape", [(4096, 4096, 2016), (1000, 520, 96), (51, 100, 37)], ids=str)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_kernels_on_a_gpu_give_the_dense_product(shape, kernel):
    for tokens in (1, 2, 8, 16, 17, 64, 127, 128, 300):
        for dtype, limit in ((torch.bfloat16, 3e-3), (torch.float16, 1e-3)):
            if kernel == "flip" and tokens > 1:
                continue
            if kernel == "unpack" and dtype == torch.bfloat16:
                limit = 1e-2  # scales are applied in the dtype of x
            args = arguments(*shape, lead=(tokens,), dtype=dtype)
            truth = expected(*args).cuda()
            y = gpu.run(kernel, *(a.cuda() if torch.is_tensor(a) else a for a in args))
            assert (y.double() - truth).norm() <= limit * truth.norm(), (tokens, dtype)


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_stacked_linears_on_a_gpu_are_right(tokens):
    shapes = [(512, 512, 288), (128, 512, 96), (128, 512, 96)]
    members = [arguments(*shape, lead=(tokens,), dtype=torch.bfloat16) for shape in shapes]
    x = members[0][0]
    lists = [
        [a.cuda() if torch.is_tensor(a) else a for a in group]
        for group in list(zip(*members, strict=True))[1:]
    ]
    assert gpu.can_stack(x.cuda(), *lists)
    for y, (_, *rest) in zip(gpu.run_stacked(x.cuda(), *lists), members, strict=True):
        truth = expected(x, *rest).cuda()
        assert (y.double() - truth).norm() <= 3e-3 * truth.norm()


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
            assert gpu.choose(CARD, torch.bfloat16, tokens) != "reference", caplog.text
