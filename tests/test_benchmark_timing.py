"""Weights come from memory, contestants take turns, and what takes too long is absent."""

import math

import pytest
import torch

from nanoquant.benchmark.timing import (
    AbsentError,
    CPUClock,
    Rotation,
    cache_bytes,
    check_duration,
    copy_bandwidth,
    fastest,
    interleaved,
    matmul_rate,
    timing,
)

CPU = torch.device("cpu")


def rotation(nbytes=100_000, largest=30_000):
    block = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.manual_seed(0))
    return Rotation(nbytes, largest, block)


@pytest.mark.parametrize("sizes", [[1000], [256], [30_000], [700, 30_000, 12]], ids=str)
def test_a_byte_comes_again_only_after_all_the_asked_bytes(sizes):
    pieces, asked = rotation(), 100_000
    last, passed, again = {}, 0, []
    for step in range(2000):
        size = sizes[step % len(sizes)]
        piece = pieces.take([size], torch.uint8)
        begin = piece.data_ptr() - pieces.memory.data_ptr()
        blocks = range(begin // 256, (begin + size - 1) // 256 + 1)
        again += [passed - last[block] for block in blocks if block in last]
        passed += len(blocks) * 256
        last |= dict.fromkeys(blocks, passed)
    assert again and min(again) >= asked - max(sizes)
    assert len(last) * 256 >= asked


def test_consecutive_pieces_are_different_memory():
    pieces = rotation()
    taken = [pieces.take([10, 20], torch.bfloat16) for _ in range(50)]
    spans = sorted((t.data_ptr(), t.data_ptr() + 400) for t in taken)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert all(begin % 256 == spans[0][0] % 256 for begin, _ in spans)


def test_a_rotation_is_random_in_all_its_length():
    memory = rotation().memory
    assert all(len(piece.unique()) > 200 for piece in memory.split(4096)[:-1])


def test_a_piece_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="200000 bytes is larger than the whole rotation"):
        rotation().take([200_000], torch.uint8)


def test_contestants_take_turns_and_the_median_counts():
    order, seconds = [], iter([1.0, 10.0, 3.0, 10.0, 100.0, 10.0])

    def once(name):
        order.append(name)
        return next(seconds)

    found = interleaved({name: lambda name=name: once(name) for name in "ab"}, repeats=3)
    assert "".join(order) == "ababab"
    assert (found["a"].seconds, found["b"].seconds) == (3.0, 10.0)


def test_spread_is_the_middle_half_of_the_repeats():
    assert timing([1.0] * 20).spread == 0
    assert timing([*range(1, 21)]).spread == pytest.approx(1, abs=0.01)
    assert math.isnan(timing([1.0, 2.0]).spread)


def test_every_repeat_on_a_cpu_takes_fresh_weights():
    pieces, used = rotation(), []

    def make():
        piece = pieces.take([100], torch.uint8)
        return lambda: used.append(piece.data_ptr())

    once = CPUClock(repeats=20, most_seconds=10).prepare(make, calls=7)
    used.clear()
    assert once() > 0 and once() > 0
    assert len(set(used)) == len(used) == 14


def test_what_would_take_too_long_is_absent():
    check_duration(0.1, 20, 2.1)
    with pytest.raises(AbsentError, match="20 take more than the 1 s that --most-seconds allows"):
        check_duration(0.1, 20, 1.0)
    with pytest.raises(AbsentError, match="--most-seconds"):
        CPUClock(20, 1e-9).prepare(lambda: lambda: None)


def test_the_fastest_trial_counts_and_a_hopeless_one_is_the_last():
    seconds = iter([3.0, 1.0, 2.0, 50.0, 1.0])
    assert fastest(lambda: next(seconds), hopeless=20) == 1
    assert fastest(lambda: next(seconds), hopeless=20) == 50
    assert next(seconds) == 1


def test_roofs_are_measured():
    clock = CPUClock(3, 10)
    assert 1e6 < copy_bandwidth(clock, rotation(10**6, 10**5)) < 1e13  # a loaded machine is slow
    assert 1e6 < matmul_rate(clock, CPU) < 1e16


def test_the_last_cache_is_the_largest():
    found = cache_bytes(CPU)
    assert found is None or found >= 2**15
