"""Runs the Triton kernels in Triton's interpreter; started by test_kernels_triton.py with TRITON_INTERPRET=1.

Prints one JSON line a case: its name and the relative error against float64, or the error's text.
The interpreter computes wrongly in bfloat16, so cases are float16.
"""

import json

import torch
from test_kernels_ops import arguments, expected

from nanoquant_kernels import triton_decode

CASES = {
    "one token": dict(shape=(48, 64, 32), tokens=1),
    "ragged shapes": dict(shape=(51, 100, 37), tokens=3),
    "16 tokens": dict(shape=(33, 320, 70), tokens=16),
    "no bias": dict(shape=(40, 48, 16), tokens=2, bias=False),
    "narrow rows": dict(shape=(5, 9, 1), tokens=1),
    "empty": dict(shape=(24, 40, 16), tokens=0),
    "float32 scales": dict(shape=(24, 40, 16), tokens=2, scale_dtype=torch.float32),
}


def error(shape, tokens, bias=True, scale_dtype=torch.float16):
    args = arguments(
        *shape, lead=(tokens,), dtype=torch.float16, bias=bias, scale_dtype=scale_dtype
    )
    y, truth = triton_decode.binary_low_rank_linear(*args), expected(*args)
    assert y.shape == truth.shape and y.dtype == torch.float16
    return ((y.double() - truth).norm() / truth.norm()).item() if tokens else 0.0


if __name__ == "__main__":
    torch.use_deterministic_algorithms(
        True
    )  # fills new tensors with NaN: what no kernel writes is seen
    for name, case in CASES.items():
        print(json.dumps([name, error(**case)]))
