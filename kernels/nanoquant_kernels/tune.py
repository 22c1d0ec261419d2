"""Measure tiles on this machine's GPU and write the best into ``tiles.json``; never run during a user's call.

python -m nanoquant_kernels.tune 4096x4096 11008x4096 --tokens 1 16 64 2048

A shape is rows x columns of a sign matrix. Each tile is checked before it is timed. Times are medians of graph
replays over matrices that together exceed the cache. A tile takes about a second to compile, so 16 tokens take up to
two minutes; the table is written after each number of tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from nanoquant_kernels import tiles
from nanoquant_kernels.cards import TOLERANCE
from nanoquant_kernels.layout import unpack_signs
from nanoquant_kernels.planes import PLANES, as_words, from_planes, to_planes, words_of
from nanoquant_kernels.tiles import DotTile, FlipTile

logger = logging.getLogger(__name__)

ROTATED = 256 * 2**20
"""Bytes of signs that are read in turn, so that no cache holds them."""
REPLAYS = 20
Tile = DotTile | FlipTile | None
Measure = Callable[[str, Tile, int, int, int], float]
"""(kernel, tile, rows, words, tokens) to microseconds; infinite where a tile does not run or is wrong."""


def candidates(tokens: int) -> Iterable[tuple[str, Tile]]:
    """Kernels and tiles that are worth a try for so many tokens."""
    if tokens == 1:
        for rows, warps in itertools.product((8, 16, 32), (1, 2, 4)):
            yield "flip", FlipTile(rows, warps)
    few = tokens <= 16
    if not few:
        yield "unpack", None
    grid = itertools.product(
        (16, 32, 64) if few else (64, 128),
        (32, 64, 128) if few else (16, 32),
        (16,) if few else (32, 64, 128),
        (1, 2, 4) if few else (4, 8),
        (2, 3, 4),
    )
    yield from (("dot", DotTile(*values)) for values in grid)


def tuned(
    table: dict, arch: int, shapes: list[tuple[int, int]], tokens: list[int], measure: Measure
) -> dict:
    """A table whose entries of ``arch`` for these shapes (rows, words) and token counts are measured ones."""
    new = {
        name: [e for e in table[name] if e["architecture"] != arch or e["tokens"] not in tokens]
        for name in ("kernels", "tiles")
    }
    today = {"measured": date.today().isoformat()}
    for count in tokens:
        totals = {kernel: 0.0 for kernel, _ in candidates(count)}
        for rows, words in shapes:
            best: dict[str, tuple[float, Tile]] = dict.fromkeys(totals, (math.inf, None))
            for kernel, tile in candidates(count):
                time = measure(kernel, tile, rows, words, count)
                if time < best[kernel][0]:
                    best[kernel] = time, tile
            for kernel, (time, tile) in best.items():
                totals[kernel] += time
                if tile is None:
                    continue
                entry = {"architecture": arch, "kernel": kernel, "tokens": count}
                entry |= {"shape": [rows, words], "tile": dataclasses.asdict(tile)}
                new["tiles"].append(entry | {"microseconds": round(time, 2)} | today)
        fastest = min(totals, key=totals.__getitem__)
        if totals[fastest] == math.inf:
            raise RuntimeError(
                f"no kernel runs on architecture {arch} with {count} tokens on all shapes"
            )
        new["kernels"].append({"architecture": arch, "tokens": count, "kernel": fastest} | today)
    return new


def measure_on_gpu(kernel: str, tile: Tile, rows: int, words: int, tokens: int) -> float:
    """Microseconds of a first stage, the median of graph replays divided by the launches in a graph."""
    copies = max(1, ROTATED // (2 * rows * words))
    g = torch.Generator("cuda").manual_seed(0)
    signs = torch.randint(
        0, 256, (copies, rows, 2 * words), dtype=torch.uint8, device="cuda", generator=g
    )
    x = torch.randn(tokens, PLANES * words, device="cuda", generator=g).to(
        torch.float16 if kernel == "flip" else torch.bfloat16
    )
    planes = to_planes(x)
    try:
        given = x if kernel == "unpack" else planes
        z = stage(kernel, tile, given, signs[0])
        z = z if kernel == "unpack" else from_planes(z, rows)
        truth = x.double() @ unpack_signs(signs[0], PLANES * words, torch.float64).T
        error = float((z.double() - truth).norm() / truth.norm())
        if not error <= TOLERANCE:
            logger.warning("%s %s is wrong: relative error %.1e", kernel, tile, error)
            return math.inf
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for matrix in signs:
                stage(kernel, tile, given, matrix)
        return median_replay(graph) / copies
    except Exception as failure:  # what a compiler raises is not documented
        logger.info("%s %s does not run: %s", kernel, tile, failure)
        return math.inf


def stage(kernel: str, tile: Tile, planes: Tensor, signs: Tensor) -> Tensor:
    """One launch of a first stage: activations (tokens, 16 P) and latents in plane order, signs (R, 2 P)."""
    from nanoquant_kernels import triton_dot, triton_flip, triton_unpack

    if kernel == "unpack":  # activations are not in plane order
        return triton_unpack.signed_product(planes, signs)
    tokens, R = planes.shape[0], signs.shape[0]
    P, P_out = planes.shape[1] // PLANES, words_of(R)
    out = planes.new_empty(tokens, PLANES * P_out)
    if kernel == "flip":
        words = as_words(signs, torch.int32)
        grid, options = triton_flip.launch(tile, PLANES * P_out)
        pairs = planes.view(torch.int32)
        triton_flip.latent_stage[grid](pairs, words, out, R, words.shape[1], P_out, 1.0, **options)
    else:
        words = as_words(signs)
        grid, options = triton_dot.launch(tile, PLANES * P_out, P, planes)
        one = triton_dot.ONE[planes.dtype]
        triton_dot.latent_stage[grid](planes, words, out, R, P, P_out, tokens, one, **options)
    return out


def median_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay."""
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times)[REPLAYS // 2]


def shape(text: str) -> tuple[int, int]:
    """Rows and words of "rows x columns"."""
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns) % 32 == 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not like 4096x11008, rows x columns, columns a multiple of 32"
        )
    return int(rows), int(columns) // PLANES


def tune(
    arch: int, shapes: list[tuple[int, int]], tokens: list[int], measure: Measure, out: str | Path
) -> None:
    """Write the table after each number of tokens, so that an interrupted run keeps what it has."""
    table = tiles.table()
    for count in tokens:
        table = tuned(table, arch, shapes, [count], measure)
        tiles.write(table, out)


def main() -> None:
    """Tune for the shapes on the command line and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", type=shape, help="rows x columns of a sign matrix")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 2048])
    parser.add_argument("--out", default=str(tiles.TABLE), help="table to write")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA device, and none is available")
    major, minor = torch.cuda.get_device_capability()
    tune(10 * major + minor, arguments.shapes, arguments.tokens, measure_on_gpu, arguments.out)


if __name__ == "__main__":
    main()
