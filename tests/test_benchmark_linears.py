"""Implementations are right before they are timed; what is wrong is refused, what can't be taken is absent."""

import pytest
import torch

from nanoquant.benchmark import correctness, speed
from nanoquant.benchmark.correctness import (
    check,
    check_group,
    check_head,
    dense_product,
    exact_product,
    packed_product,
)
from nanoquant.benchmark.linears import (
    CODEBOOKS,
    DENSE,
    LOOKED_UP,
    OPERATOR,
    PACKED,
    SHARED,
    Bench,
    Linear,
    kernel_of,
)
from nanoquant.benchmark.speed import time_chain, time_linear
from nanoquant.benchmark.timing import CPUClock, Rotation, TooSlowError
from nanoquant.embedding import EmbeddingConfig
from nanoquant.product_budget import ProductShape
from nanoquant_kernels import compiled, cpu, unpack_signs
from nanoquant_kernels.cpu_build import available_paths
from nanoquant_kernels.layout import align_rows
from nanoquant_kernels.product import dequantize

SMALL = Linear(48, 40, 32)
LOOKED = {
    "8:4": Linear(48, 40, 32, ProductShape(8, (4,))),
    "8:6+4 x2": Linear(256, 128, 32, ProductShape(8, (6, 4), 2)),
    "4:10": Linear(256, 30, 32, ProductShape(4, (10,))),
}


@pytest.fixture
def bench():
    torch.manual_seed(0)
    signs = torch.randint(0, 256, (2**16,), dtype=torch.uint8)
    reals = torch.randn(2**15).bfloat16()
    rotations = Rotation(10**6, 10**5, signs), Rotation(10**6, 10**6, reals)
    return Bench(*rotations, CPUClock(20, 5.0), most_error=8e-3, cache=10**6)


def none_absent(name, why):
    raise AssertionError(f"{name}: {why}")


@pytest.mark.parametrize("linear", [SMALL, Linear(30, 21, 13), Linear(24, 1100, 1050)], ids=str)
def test_the_float64_product_is_that_of_the_dense_weight(bench, linear):
    u, v, s1, s2, bias, rank = bench.arguments(OPERATOR, linear)
    x = torch.randn(5, linear.d_in, dtype=torch.float64)
    U, V = (unpack_signs(u, rank, torch.float64), unpack_signs(v, linear.d_in, torch.float64))
    weight = s1.double()[:, None] * (U @ V) * s2.double()
    torch.testing.assert_close(packed_product(x, u, v, s1, s2, bias, rank), x @ weight.mT)
    torch.testing.assert_close(dense_product(x, weight), x @ weight.mT)


@pytest.mark.parametrize("shape", ["8:4", "8:6+4 x2", "4:10"])
def test_the_float64_product_of_looked_up_weights_is_that_of_the_dense_one(bench, shape):
    linear = LOOKED[shape]
    weight = bench.arguments(CODEBOOKS, linear)
    x = torch.randn(5, linear.d_in, dtype=torch.float64)
    exact = [w.double() if w is not None and w.is_floating_point() else w for w in weight[:5]]
    dense = dequantize(*exact, linear.d_in)
    torch.testing.assert_close(exact_product(CODEBOOKS)(x, *weight), x @ dense.mT)
    for name in LOOKED_UP:
        assert 0 < check(bench, name, linear, 3) < bench.most_error


def test_figures_of_looked_up_weights_count_indices_codebooks_and_scales(bench):
    linear = LOOKED["8:6+4 x2"]
    rows = {row["implementation"]: row for row in time_linear(bench, linear, 2, none_absent)}
    assert list(rows) == [DENSE, *PACKED, *LOOKED_UP]
    row = rows[CODEBOOKS]
    assert row["weight_bytes"] == 256 * (12 + 8) + 2 * (2 * (64 + 16) * 8 + 256)
    assert row["operations"] == 2 * 2 * 256 * 128
    assert row["kernel"] == (available_paths()[-1] if available_paths() else "reference")
    assert rows["codebooks, reference"]["kernel"] is None


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("name", [DENSE, *PACKED])
def test_every_implementation_is_right(bench, name, tokens):
    for linear in (SMALL, Linear(30, 21, 13)):
        assert 0 < check(bench, name, linear, tokens) < bench.most_error


def flipped_sign(*arguments):
    y = PACKED["reference"](*arguments)
    y[..., 3] *= -1
    return y


def wrong_row(*arguments):
    y = PACKED["reference"](*arguments)
    y[len(y) // 3] = 0
    return y


WRONG = {
    "one output": flipped_sign,
    "one token": wrong_row,
    "not finite": lambda *arguments: PACKED["reference"](*arguments) * torch.nan,
    "a shape": lambda *arguments: PACKED["reference"](*arguments)[..., :-1],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_implementation_is_refused_and_not_timed(bench, wrong, monkeypatch):
    monkeypatch.setitem(PACKED, OPERATOR, wrong)
    monkeypatch.setattr(speed, "interleaved", None)
    with pytest.raises(FloatingPointError, match=OPERATOR):
        time_linear(bench, SMALL, 300, none_absent)
    with pytest.raises(FloatingPointError, match=OPERATOR):
        time_chain(bench, [(SMALL,)], 300, none_absent)


def test_what_an_implementation_refuses_is_absent_and_the_others_are_measured(bench, monkeypatch):
    def refuses(*arguments):
        raise ValueError("serves 1 to 16 tokens, got 17")

    monkeypatch.setitem(PACKED, OPERATOR, refuses)
    absent = []
    rows = time_linear(bench, SMALL, 17, lambda *what: absent.append(what))
    assert [row["implementation"] for row in rows] == [DENSE, "reference"]
    assert absent == [(OPERATOR, "refused: serves 1 to 16 tokens, got 17")]


def test_figures_of_a_linear_fit_together(bench):
    rows = {row["implementation"]: row for row in time_linear(bench, SMALL, 2, none_absent)}
    assert list(rows) == [DENSE, *PACKED]
    assert rows[DENSE]["ratio_to_dense"] == 1 and rows[DENSE]["weight_bytes"] == 2 * 48 * 40
    for row in rows.values():
        seconds = row["microseconds"] / 1e6
        assert row["gb_per_s"] == pytest.approx(row["weight_bytes"] / seconds / 1e9)
        assert row["ratio_to_dense"] == pytest.approx(
            rows[DENSE]["microseconds"] / row["microseconds"]
        )
    packed = rows[OPERATOR]
    assert packed["weight_bytes"] == 48 * 4 + 32 * 5 + 2 * (48 + 40)
    assert packed["operations"] == 2 * 2 * 32 * (48 + 40)


def test_without_a_dense_figure_there_is_no_ratio(bench, monkeypatch):
    monkeypatch.setattr(
        "nanoquant.benchmark.linears.function_of", lambda name: PACKED.get(name, _out_of_memory)
    )
    absent = []
    rows = time_linear(bench, SMALL, 1, lambda *what: absent.append(what))
    assert {row["ratio_to_dense"] for row in rows} == {None}
    assert absent == [(DENSE, "out of memory: too large")]


def _out_of_memory(*arguments):
    raise MemoryError("too large")


def test_weights_are_said_to_come_from_a_cache_unless_four_times_its_size_passes_between(bench):
    assert bench.in_cache(3_999_999) is True and bench.in_cache(4_000_000) is False
    bench.cache = None
    assert bench.in_cache(10**12) is None


def test_a_chain_runs_every_linear_in_order_with_weights_of_its_own(bench, monkeypatch):
    layers, calls = [SMALL, Linear(40, 48, 32), SMALL], []

    def noted(x, u_signs, *rest):
        calls.append((u_signs.data_ptr(), x.shape[-1]))
        return PACKED["reference"](x, u_signs, *rest)

    monkeypatch.setitem(PACKED, OPERATOR, noted)
    rows = time_chain(bench, [(layer,) for layer in layers], 2, none_absent)
    timed = calls[2:]  # the first two are checks of the two shapes
    assert [width for _, width in timed[:6]] == [40, 48, 40] * 2
    assert len(set(timed)) == 3 and timed[:3] == timed[3:6] == timed[-3:]
    assert {(row["linears"], row["in_cache"]) for row in rows} == {(3, True)}
    assert rows[1]["weight_bytes"] == sum(linear.packed_bytes for linear in layers)


GROUPS = [(SMALL, Linear(30, 40, 32)), (Linear(40, 48, 32),)]


@pytest.mark.parametrize("tokens", [1, 3])
def test_linears_that_read_the_same_tensor_are_launched_together_too(bench, tokens):
    rows = {row["implementation"]: row for row in time_chain(bench, GROUPS, tokens, none_absent)}
    assert list(rows) == [DENSE, *PACKED, SHARED]
    shared, alone = rows[SHARED], rows[OPERATOR]
    for same in ("weight_bytes", "operations", "linears", "in_cache"):
        assert shared[same] == alone[same]


def test_many_tokens_are_not_launched_together_as_in_a_model(bench):
    rows = time_chain(bench, GROUPS, 17, none_absent)
    assert [row["implementation"] for row in rows] == [DENSE, *PACKED]


def test_a_group_launch_that_mixes_its_members_up_is_refused_and_not_timed(bench, monkeypatch):
    def mixed(x, *lists):
        return [PACKED["reference"](x, *arguments) for arguments in zip(*lists, strict=True)][::-1]

    group = (SMALL, SMALL)
    for module in ("correctness", "speed"):
        monkeypatch.setattr(f"nanoquant.benchmark.{module}.binary_low_rank_linears", mixed)
    monkeypatch.setattr(speed, "interleaved", None)
    with pytest.raises(FloatingPointError, match=f"{SHARED} is wrong"):
        check_group(bench, group, 1)
    with pytest.raises(FloatingPointError, match=f"{SHARED} is wrong"):
        time_chain(bench, [group], 1, none_absent)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_head_is_compared_with_float64(bench, bits, monkeypatch):
    check_head(bench, 64, EmbeddingConfig(bits=bits))
    right = correctness.QuantizedHead.forward
    monkeypatch.setattr(correctness.QuantizedHead, "forward", lambda self, x: 1.1 * right(self, x))
    with pytest.raises(FloatingPointError, match=f"the quantized head is wrong.*{bits} bits"):
        check_head(bench, 64, EmbeddingConfig(bits=bits))


class OnGPU(Bench):
    """Lays weights out as on a GPU, in memory of the CPU."""

    device = torch.device("cuda")


def test_on_a_gpu_rows_are_aligned_as_in_a_model_and_padded_with_zeros(bench):
    aligned = OnGPU(bench.signs, bench.reals, bench.clock, bench.most_error, bench.cache)
    u, v, *rest = aligned.arguments(OPERATOR, Linear(30, 21, 13))
    assert (u.shape, v.shape) == ((30, 2), (13, 3)) and u.stride(0) == v.stride(0) == 16
    for packed in (u, v):
        whole = packed.as_strided((len(packed), 16), (16, 1))
        assert align_rows(packed) is packed and not whole[:, packed.shape[1] :].any()
    x = torch.randn(2, 21).bfloat16()
    assert torch.equal(
        PACKED[OPERATOR](x, u, v, *rest), PACKED[OPERATOR](x, u.clone(), v.clone(), *rest)
    )
    assert u.unique().numel() > 10


def test_what_took_too_long_is_not_tried_with_more_tokens(bench, monkeypatch):
    absent, tried = [], []
    bench.clock = CPUClock(20, 1e-9)
    time_linear(bench, SMALL, 4, lambda *what: absent.append(what))
    monkeypatch.setattr(CPUClock, "prepare", lambda *arguments: tried.append(arguments))
    time_linear(bench, SMALL, 8, lambda *what: absent.append(what))
    assert tried == [] and len(absent) == 2 * len([DENSE, *PACKED])
    assert absent[-1] == ("reference", "took too long with 4 tokens already")
    monkeypatch.setattr(CPUClock, "prepare", _too_slow)
    time_linear(bench, SMALL, 2, lambda *what: tried.append(what))
    assert len(tried) == len([DENSE, *PACKED])


def _too_slow(*arguments):
    raise TooSlowError("still")


def test_a_figure_names_the_kernel_that_served(bench):
    kernels = [row["kernel"] for row in time_linear(bench, SMALL, 1, none_absent)]
    fastest = available_paths()[-1] if available_paths() else "reference"
    assert kernels == [None, fastest, None]
    rows = time_linear(bench, SMALL, 300, none_absent)
    assert rows[1]["kernel"] == "reference"


def test_generated_code_is_named_where_it_serves(monkeypatch):
    monkeypatch.setattr(cpu, "available_paths", tuple)
    monkeypatch.setattr(compiled, "works", lambda: True)
    served, refused = torch.ones(1, 96), torch.ones(compiled.MOST_TOKENS + 1, 96)
    linear = Linear(24, 96, 64)
    assert kernel_of(OPERATOR, served, linear, ()) == "generated"
    assert kernel_of(OPERATOR, refused, linear, ()) == "reference"


def test_memory_that_is_read_between_repeats_counts_for_a_chain(bench, monkeypatch):
    assert time_chain(bench, [(SMALL,)], 1, none_absent)[0]["in_cache"] is True
    monkeypatch.setattr(CPUClock, "evicted_bytes", 10**7)
    assert time_chain(bench, [(SMALL,)], 1, none_absent)[0]["in_cache"] is False
