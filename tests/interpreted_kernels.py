"""Runs the Triton kernels in Triton's interpreter; started by test_kernels_triton.py with TRITON_INTERPRET=1.

Prints one JSON line a case: its name and the relative error against float64.
The interpreter computes wrongly in bfloat16, so cases are float16 or float32.
"""

import json

import torch
from test_kernels_ops import arguments, expected

from nanoquant_kernels import pack_signs, triton_dot, triton_flip, triton_unpack, tune
from nanoquant_kernels.planes import from_planes, to_planes
from nanoquant_kernels.tiles import DotTile, FlipTile

KERNELS = {"dot": triton_dot, "flip": triton_flip, "unpack": triton_unpack}
ANY = {
    "one token": dict(shape=(48, 64, 32), lead=(1,)),
    "ragged": dict(shape=(51, 100, 37), lead=(1,)),
    "no bias": dict(shape=(40, 48, 16), lead=(1, 1), bias=False),
    "narrow rows": dict(shape=(5, 9, 1), lead=()),
    "float32 scales": dict(shape=(24, 40, 16), lead=(1,), scale_dtype=torch.float32),
    "several tiles": dict(shape=(70, 2100, 600), lead=(1,)),
}
MANY = {
    "3 tokens": dict(shape=(51, 100, 37), lead=(3,)),
    "16 tokens": dict(shape=(33, 320, 70), lead=(16,)),
    "17 tokens": dict(shape=(33, 320, 70), lead=(17,)),
    "2 x 35 tokens": dict(shape=(33, 100, 70), lead=(2, 35)),
    "empty": dict(shape=(24, 40, 16), lead=(2, 0)),
}
CASES = {(kernel, name): case for kernel in KERNELS for name, case in ANY.items()}
CASES |= {(kernel, name): case for kernel in ("dot", "unpack") for name, case in MANY.items()}
CASES |= {
    ("flip", "float32"): dict(shape=(24, 40, 16), lead=(1,), dtype=torch.float32),
    ("flip", "large"): dict(
        shape=(24, 400, 16), lead=(1,), dtype=torch.float32, factor=1e20, bias=False
    ),
    ("flip", "small"): dict(
        shape=(24, 400, 16), lead=(1,), dtype=torch.float32, factor=1e-20, bias=False
    ),
    ("unpack", "float32"): dict(shape=(24, 40, 16), lead=(3,), dtype=torch.float32),
}


def error(kernel, shape, lead, bias=True, scale_dtype=None, dtype=torch.float16, factor=1.0):
    x, *rest = arguments(*shape, lead=lead, dtype=dtype, bias=bias, scale_dtype=scale_dtype)
    args = x * factor, *rest
    y, truth = KERNELS[kernel].binary_low_rank_linear(*args), expected(*args)
    assert y.shape == truth.shape and y.dtype == dtype
    return ((y.double() - truth).norm() / truth.norm()).item() if truth.numel() else 0.0


def main():
    # fills new tensors with NaN: what no kernel writes is seen
    torch.use_deterministic_algorithms(True)
    for (kernel, name), case in CASES.items():
        print(json.dumps([f"{kernel}, {name}", error(kernel, **case)]), flush=True)
    x, *rest = arguments(24, 40, 16, lead=(1,), dtype=torch.float16)
    x[0, 7] = torch.nan
    for kernel, module in KERNELS.items():
        y = module.binary_low_rank_linear(x, *rest)
        print(json.dumps([f"{kernel}, NaN", float(y.isnan().all())]))
    for kernel, tile in (("dot", DotTile(rows=16)), ("flip", FlipTile(rows=8))):
        print(json.dumps([f"{kernel}, tuned stage", stage_error(kernel, tile)]))


def stage_error(kernel, tile):
    """Error of what the tuner times."""
    g = torch.Generator().manual_seed(0)
    x, signs = torch.randn(1, 128, generator=g).half(), torch.randn(40, 128, generator=g).sign()
    z = from_planes(tune.stage(kernel, tile, to_planes(x), pack_signs(signs)), 40)
    truth = x.double() @ signs.double().T
    return ((z.double() - truth).norm() / truth.norm()).item()


if __name__ == "__main__":
    main()
