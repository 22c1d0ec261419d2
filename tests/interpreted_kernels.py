"""Runs the Triton kernels in Triton's interpreter; started by test_kernels_triton.py with TRITON_INTERPRET=1.

Prints one JSON line a case: its name and the relative error against float64.
The interpreter computes wrongly in bfloat16, so cases are float16 or float32.
"""

import json

import torch
from test_kernels_ops import arguments, expected

from nanoquant_kernels import (
    pack_signs,
    product,
    table,
    triton_dot,
    triton_flip,
    triton_product,
    triton_stack,
    triton_table,
    triton_unpack,
    tune,
)
from nanoquant_kernels.layout import align_rows
from nanoquant_kernels.outputs import parts
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
    "rank above both sides": dict(shape=(48, 80, 144), lead=(1,)),
}
MANY = {
    "3 tokens": dict(shape=(51, 100, 37), lead=(3,)),
    "16 tokens": dict(shape=(33, 320, 70), lead=(16,)),
    "17 tokens": dict(shape=(33, 320, 70), lead=(17,)),
    "rank above both sides, 5 tokens": dict(shape=(48, 80, 144), lead=(5,)),
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
    ("dot", "aligned rows"): dict(shape=(70, 200, 40), lead=(2,), align=True),
    ("flip", "aligned rows"): dict(shape=(70, 200, 40), lead=(1,), align=True),
    ("unpack", "aligned rows"): dict(shape=(70, 200, 40), lead=(1,), align=True),
    ("unpack", "float32"): dict(shape=(24, 40, 16), lead=(3,), dtype=torch.float32),
    ("dot", "strided"): dict(shape=(70, 200, 40), lead=(2,), stride=True),
    ("flip", "strided"): dict(shape=(70, 200, 40), lead=(1,), stride=True),
    ("unpack", "strided"): dict(shape=(70, 200, 40), lead=(2,), stride=True),
    ("flip", "tiny"): dict(
        shape=(24, 400, 16), lead=(1,), dtype=torch.float32, factor=1e-36, bias=False
    ),
}

STACKS = {  # d_out, d_in, rank of each member
    "q, k, v": dict(
        shapes=[(96, 128, 64), (40, 128, 32), (40, 128, 32)], lead=(1,), bias=[False] * 3
    ),
    "bias of one": dict(shapes=[(70, 112, 48), (33, 112, 80)], lead=(3,), bias=[True, False]),
    "aligned rows": dict(
        shapes=[(70, 100, 40), (33, 100, 200)], lead=(1,), bias=[False] * 2, align=True
    ),
    "16 tokens": dict(shapes=[(70, 320, 48), (70, 320, 48)], lead=(2, 8), bias=[True, True]),
    "ranks above both sides": dict(
        shapes=[(96, 64, 192), (32, 64, 64), (32, 64, 96)], lead=(1,), bias=[False] * 3
    ),
}


PRODUCTS = {
    "8 bits": dict(widths=(8,), group=8, lead=(3,)),
    "two stages": dict(widths=(4, 4), group=8, lead=(1, 1)),
    "bits across bytes": dict(widths=(6, 10), group=4, lead=(13,)),
    "12 bits, ragged": dict(widths=(12,), group=7, lead=(2,)),
    "float32 codebooks": dict(widths=(6,), group=16, lead=(3,), book_dtype=torch.float32),
}


def error(
    kernel, shape, lead, dtype=torch.float16, factor=1.0, align=False, stride=False, **options
):
    x, u, v, *rest = arguments(*shape, lead=lead, dtype=dtype, **options)
    args = x * factor, *((aligned(u), aligned(v)) if align else (u, v)), *rest
    if stride:
        args = [every_second(t) if torch.is_tensor(t) else t for t in args]
    y, truth = KERNELS[kernel].binary_low_rank_linear(*args), expected(*args)
    assert y.shape == truth.shape and y.dtype == dtype
    return ((y.double() - truth).norm() / truth.norm()).item() if truth.numel() else 0.0


def every_second(tensor):
    """The same values, not contiguous."""
    wide = tensor.new_zeros(*tensor.shape, 2)
    wide[..., 0] = tensor
    return wide[..., 0]


def aligned(signs):
    """Rows with padding that holds anything."""
    padded = align_rows(signs)
    storage = padded.as_strided((len(signs), padded.stride(0)), (padded.stride(0), 1))
    assert storage.shape[1] % 16 == 0 and storage.shape[1] > signs.shape[1]
    storage[:, signs.shape[1] :] = 0xA5
    return padded


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

    for bits, lead in ((8, (3,)), (4, (3,)), (8, (1, 1)), (4, (13,))):
        print(json.dumps([f"table, {bits} bits, {lead}", table_error(bits, lead)]))
    for name, case in PRODUCTS.items():
        print(json.dumps([f"product, {name}", product_error(**case)]))
    for name, case in STACKS.items():
        print(json.dumps([f"stack, {name}", stack_error(**case)]))


def table_error(bits, lead):
    """Error of a product with a table of codes, with a bias for one token only."""
    x, *rest, bias = triton_table.trial("cpu", torch.float16, bits)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*lead, x.shape[-1], generator=g).half()
    args = x, *rest, bias if lead == (1, 1) else None
    exact = (t.double() if t is not None and t.is_floating_point() else t for t in args)
    y, truth = triton_table.table_linear(*args), table.table_linear(*exact)
    assert y.shape == truth.shape and y.dtype == x.dtype
    return ((y.double() - truth).norm() / truth.norm()).item()


def product_error(widths, group, lead, book_dtype=torch.float16):
    """Error of a product with a looked-up weight of two slabs, with a bias for one token only."""
    x, *rest, scale, bias = triton_product.trial("cpu", torch.float16, widths, group)
    x = torch.randn(*lead, x.shape[-1], generator=torch.Generator().manual_seed(1)).half()
    rest = [t.to(book_dtype) if t is not None and t.is_floating_point() else t for t in rest]
    args = x, *rest, scale, bias if lead == (1, 1) else None
    exact = (t.double() if t is not None and t.is_floating_point() else t for t in args)
    y, truth = triton_product.product_linear(*args), product.product_linear(*exact)
    assert y.shape == truth.shape and y.dtype == x.dtype
    return ((y.double() - truth).norm() / truth.norm()).item()


def stack_error(shapes, lead, bias, align=False):
    """Largest error of several linears of the same x."""
    members = [arguments(*shape, lead=lead, dtype=torch.float16) for shape in shapes]
    x = members[0][0]
    if align:
        members = [(x, aligned(u), aligned(v), *rest) for _, u, v, *rest in members]
    outs = [m[3].shape[0] for m in members]
    biases = [m[5] if has else None for m, has in zip(members, bias, strict=True)]
    u, v, s1, s2, _, ranks = (list(group) for group in list(zip(*members, strict=True))[1:])
    flat = triton_stack.binary_low_rank_linears(x, u, v, s1, s2, biases, ranks)
    outputs = parts(flat, x, outs)
    errors = []
    for y, *rest in zip(outputs, u, v, s1, s2, biases, ranks, strict=True):
        truth = expected(x, *rest)
        assert y.shape == truth.shape and y.dtype == x.dtype and y.is_contiguous()
        errors.append(((y.double() - truth).norm() / truth.norm()).item())
    return max(errors)


def stage_error(kernel, tile):
    """Error of what the tuner times."""
    g = torch.Generator().manual_seed(0)
    x, signs = torch.randn(1, 128, generator=g).half(), torch.randn(40, 128, generator=g).sign()
    z = from_planes(tune.stage(kernel, tile, to_planes(x), pack_signs(signs)), 40)
    truth = x.double() @ signs.double().T
    return ((z.double() - truth).norm() / truth.norm()).item()


if __name__ == "__main__":
    main()
