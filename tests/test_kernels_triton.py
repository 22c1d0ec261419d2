"""Triton kernels without a GPU: right in the interpreter, and lean in the machine code of every architecture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import sass
from interpreted_kernels import CASES

from nanoquant_kernels import pack_signs, triton_decode
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


@pytest.mark.parametrize("case", CASES)
def test_decode_gives_the_dense_product_and_writes_every_element(case, interpreted):
    assert interpreted[case] < 1e-3


def test_what_decode_does_not_take_is_refused():
    x = torch.zeros(17, 32, dtype=torch.bfloat16)
    signs = torch.zeros(32, 4, dtype=torch.uint8)
    scale = torch.ones(32)
    with pytest.raises(ValueError, match="up to 16 tokens in bfloat16 or float16, got 17"):
        triton_decode.binary_low_rank_linear(x, signs, signs, scale, scale, None, 32)
    with pytest.raises(ValueError, match=r"got 1 in torch\.float32"):
        triton_decode.binary_low_rank_linear(x[:1].float(), signs, signs, scale, scale, None, 32)


TYPES = {
    "x": "*bf16", "words": "*i16", "out": "*bf16", "scale": "*bf16", "bias": "*bf16",
    "R": "i32", "P_OUT": "i32", "tokens": "i32", "stride": "i32",
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
@pytest.mark.parametrize("stage", ["latent_stage", "output_stage"])
def test_decode_stays_within_its_instructions_a_weight(stage, arch):
    tile = triton_decode.Tile()
    constants = {
        "P": 256, "UNIT": 16, "one": 0x3F80, "asm": True,
        "BLOCK_R": tile.rows, "BLOCK_P": tile.words, "M": 8,
    }  # fmt: skip
    kernel = sass.compile_kernel(
        getattr(triton_decode, stage), TYPES, constants, arch, tile.warps, tile.stages
    )
    code = sass.disassemble(kernel)
    weights = tile.rows * tile.words * 16
    assert len(code.loop) * 32 * tile.warps / weights <= 1.5
    assert any("LDGSTS" in op and ".128" in op for op in code.loop)
    assert code.count("HMMA") == 64 and code.count("STS") == 0
    assert code.stack == 0
