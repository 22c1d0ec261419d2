"""Triton kernels without a GPU: right in the interpreter, and lean in the machine code of every architecture."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import sass
from interpreted_kernels import CASES, KERNELS, PRODUCTS, STACKS

from nanoquant_kernels import (
    pack_signs,
    tiles,
    triton_dot,
    triton_flip,
    triton_product,
    triton_stack,
    triton_table,
)
from nanoquant_kernels.planes import as_words, from_planes, to_planes


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100])
def test_plane_order_goes_there_and_back(columns):
    x = torch.arange(3 * columns).view(3, columns)
    planes = to_planes(x)
    assert planes.shape == (3, -(-columns // 16) * 16)
    assert torch.equal(from_planes(planes, columns), x)


def test_bit_j_of_every_stored_word_belongs_to_plane_j():
    signs = torch.where(torch.rand(5, 100, generator=torch.manual_seed(0)) < 0.5, -1, 1)
    words, planes = as_words(pack_signs(signs)), to_planes(signs).view(5, 16, -1)
    for j in range(16):
        inside = planes[:, j] != 0
        bits = (words.int() >> j & 1)[inside]
        assert torch.equal(1 - 2 * bits, planes[:, j][inside].int())


@pytest.fixture(scope="module")
def interpreted():
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_kernels_give_the_dense_product_and_write_every_element(case, interpreted):
    assert interpreted[", ".join(case)] < (1e-6 if case == ("unpack", "float32") else 1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_spreads_as_in_a_dense_product(kernel, interpreted):
    assert interpreted[f"{kernel}, NaN"] == 1


@pytest.mark.parametrize(
    "case", ["8 bits, (3,)", "4 bits, (3,)", "8 bits, (1, 1)", "4 bits, (13,)"]
)
def test_a_head_of_codes_gives_the_dense_product(case, interpreted):
    assert interpreted[f"table, {case}"] < 1e-3


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_looked_up_weight_gives_the_dense_product(name, interpreted):
    assert interpreted[f"product, {name}"] < 2e-3


@pytest.mark.parametrize("name", STACKS)
def test_stacked_linears_give_what_each_gives_alone(name, interpreted):
    assert interpreted[f"stack, {name}"] < 1e-3


@pytest.mark.parametrize("kernel", ["dot", "flip"])
def test_the_tuner_times_a_stage_that_is_right(kernel, interpreted):
    assert interpreted[f"{kernel}, tuned stage"] < 2e-3


def test_what_a_kernel_does_not_take_is_refused():
    signs, scale = torch.zeros(32, 4, dtype=torch.uint8), torch.ones(32)
    rest = signs, signs, scale, scale, None, 32
    with pytest.raises(ValueError, match=r"bfloat16 or float16, got torch\.float32"):
        triton_dot.binary_low_rank_linear(torch.zeros(1, 32), *rest)
    with pytest.raises(ValueError, match="takes one token, got 2"):
        triton_flip.binary_low_rank_linear(torch.zeros(2, 32), *rest)
    x, codes, scales, _, bias = triton_table.trial("cpu", torch.bfloat16, 8)
    with pytest.raises(ValueError, match=r"1 to 16 tokens .* got x of shape \(17, 256\)"):
        triton_table.table_linear(x[:1].expand(17, -1), codes, scales, None, bias)
    x, *weight = triton_product.trial("cpu", torch.float32, (8,), 8)
    with pytest.raises(ValueError, match="1 to 16 tokens in bfloat16 or float16"):
        triton_product.product_linear(x, *weight)
    lists = [[value, value] for value in rest]
    with pytest.raises(ValueError, match=r"can't share launches: x \(17, 32\)"):
        triton_stack.binary_low_rank_linears(torch.zeros(17, 32).half(), *lists)


TYPES = {
    "x": "*bf16", "words": "*i16", "out": "*bf16", "scale": "*bf16", "bias": "*bf16",
    "R": "i32", "P_OUT": "i32", "tokens": "i32",
}  # fmt: skip


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory that a block may take."""


def compiled(stage, tile, arch, P):
    constants = {
        "P": P, "one": 0x3F80, "asm": True,
        "BLOCK_R": tile.rows, "BLOCK_P": tile.words, "M": tile.tokens,
    }  # fmt: skip
    return sass.compile_kernel(stage, TYPES, constants, arch, tile.warps, tile.stages)


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("stage", ["latent_stage", "output_stage"])
def test_decode_on_tensor_cores_stays_within_its_instructions_a_weight(stage, arch):
    tile = dataclasses.replace(tiles.tile_for(arch, "dot", 8, 4096, 256), tokens=8)
    code = sass.disassemble(compiled(getattr(triton_dot, stage), tile, arch, 256))
    weights = tile.rows * tile.words * 16
    assert len(code.loop) * 32 * tile.warps / weights <= 1.5
    assert any("LDGSTS" in op and ".128" in op for op in code.loop)
    assert code.count("HMMA") == 64 and code.count("STS") == 0
    assert code.stack == 0


@pytest.mark.parametrize("arch", SHARED)
def test_decode_by_flips_stays_within_its_instructions_a_weight(arch):
    types = {"R": "i32", "P_OUT": "i32", "shrink": "fp32", "out": "*fp16"} | dict.fromkeys(
        ("pairs", "words"), "*i32"
    )
    tile = tiles.FlipTile()
    constants = {"Q": 1024, "asm": True, "BLOCK_R": tile.rows, "BLOCK_Q": 32}
    kernel = sass.compile_kernel(triton_flip.latent_stage, types, constants, arch, tile.warps)
    code = sass.disassemble(kernel)
    assert len(code.loop) * 32 * tile.warps / (tile.rows * 32 * 32) <= 2.0
    assert all(".128" in op for op in code.loop if "LDG" in op)
    assert code.stack == 0


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_prefill_unpacks_in_registers_and_fits_the_card(tokens, arch):
    tile = tiles.tile_for(arch, "dot", tokens, 4096, 256)
    kernel = compiled(triton_dot.output_stage, tile, arch, 256)
    code = sass.disassemble(kernel)
    assert kernel.metadata.shared <= SHARED[arch] * 1024
    assert code.count("STS") == 0 and code.stack == 0
    products = code.count("HMMA", "HGMMA")
    assert products >= (16 if arch == 90 else 0.29 * len(code.loop))


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_of_codes_fits_every_card(bits, arch):
    types = dict.fromkeys(("x", "scales", "bias", "out"), "*bf16") | {"N": "i32", "tokens": "i32"}
    constants = {"D": 576, "BLOCK_R": triton_table.BLOCK_R, "M": 8}
    if bits == 8:
        kernel, types = triton_table.eight_bit_rows, types | {"codes": "*i8"}
        constants |= {"BLOCK_D": 128}
    else:
        kernel, types = triton_table.four_bit_rows, types | {"codes": "*u8", "zeros": "*i8"}
        constants |= {"G": 18}
    compiled = sass.compile_kernel(kernel, types, constants, arch, warps=2)
    code = sass.disassemble(compiled)
    assert compiled.metadata.shared <= SHARED[arch] * 1024
    assert code.count("HMMA") > 0 and code.stack == 0


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("widths", [(8, 0), (4, 4), (10, 6)], ids=str)
def test_the_looked_up_weight_fits_every_card(widths, arch):
    types = dict.fromkeys(("x", "book", "book2", "scale", "bias", "out"), "*bf16")
    types |= {"indices": "*u8", "indices2": "*u8"}
    types |= dict.fromkeys(("N", "slab_rows", "bytes1", "bytes2", "tokens"), "i32")
    constants = {"D": 2048, "G": 8, "WIDTH": widths[0], "WIDTH2": widths[1], "M": 8}
    constants |= {"BLOCK_R": triton_product.BLOCK_R, "BLOCK_D": triton_product.BLOCK_D}
    kernel = triton_product.product_rows
    compiled = sass.compile_kernel(kernel, types, constants, arch, warps=4)
    code = sass.disassemble(compiled)
    assert compiled.metadata.shared <= SHARED[arch] * 1024
    assert code.count("HMMA") > 0 and code.stack <= 8  # bytes


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("stage", ["stacked_latent_stage", "stacked_output_stage"])
def test_shared_launches_compile_to_wide_loads_without_spills(stage, arch):
    tile = tiles.tile_for(arch, "dot", 8, 4096, 256)
    types = {"table": "*i64", "x": "*bf16", "out": "*bf16", "starts": "*i64"}
    types |= {"P_OUT": "i32", "tokens": "i32"}
    constants = {
        "P": 256, "FIELDS": triton_stack.FIELDS, "UNIT": 16, "one": 0x3F80, "asm": True,
        "BLOCK_R": tile.rows, "BLOCK_P": tile.words, "M": 8,
    }  # fmt: skip
    if stage == "stacked_output_stage":
        constants |= dict.fromkeys(("SCALE", "BIAS"), triton_stack.TYPES[torch.bfloat16])
    kernel = sass.compile_kernel(
        getattr(triton_stack, stage), types, constants, arch, tile.warps, tile.stages
    )
    code = sass.disassemble(kernel)
    assert code.stack == 0 and code.count("HMMA") == 64
    assert len(code.loop) * 32 * tile.warps / (tile.rows * tile.words * 16) <= 1.5
    assert any(".128" in op for op in code.loop if "LDG" in op)
