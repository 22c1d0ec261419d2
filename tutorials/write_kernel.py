"""Write a kernel for packed signs, prove it against the reference, and make it an operator of PyTorch.

    python tutorials/write_kernel.py

The kernel is in Triton. Without a GPU it runs in Triton's interpreter, which is slow and exact enough to prove it.
Shapes: x (d_in,), signs packed eight to a byte, y (d_out,).
"""

import importlib.util
import os
import sys

import torch

if importlib.util.find_spec("triton") is None:
    sys.exit("this tutorial needs the package triton, which there is for Linux: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import nanoquant_kernels as kernels  # noqa: E402
from nanoquant_kernels import reference  # noqa: E402

# 1. The layout, from `kernels/nanoquant_kernels/layout.py`: bit j of byte k of a row is column 8 k + j, and a set bit
# means -1. U (d_out, r) is stored by rows; V (d_in, r) as r rows of d_in signs. So both stages of
# y = s1 * (U (V^T (s2 * x))) are the same thing: a sum over each row of x with signs.


@triton.jit
def signed_sums(x, signs, y, columns, width, BLOCK: tl.constexpr):
    """y[row] = sum over k of sign[row, k] x[k]: one row of `width` bytes for each program."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < columns  # the last byte of a row may be padded
        byte = tl.load(signs + row * width + k // 8, mask=inside, other=0).to(tl.int32)
        minus = (byte >> (k % 8)) & 1
        value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(minus == 1, -value, value)
    tl.store(y + row, tl.sum(total, 0))


def stage(x, signs):
    """One stage: x (K,) and packed signs (R, ceil(K / 8)) to (R,), in float32."""
    y = torch.empty(len(signs), device=x.device)
    signed_sums[(len(signs),)](x.contiguous(), signs, y, len(x), signs.shape[1], BLOCK=128)
    return y


# 2. An operator. A schema, the kernel, and a function that knows shapes alone: that is what torch.compile and
# torch.export ask for. The operators of this library are made the same way, in `kernels/nanoquant_kernels/ops.py`.


@torch.library.custom_op("tutorial::one_token", mutates_args=())
def one_token(
    x: torch.Tensor,
    u_signs: torch.Tensor,
    v_signs: torch.Tensor,
    s1: torch.Tensor,
    s2: torch.Tensor,
) -> torch.Tensor:
    """s1 * (U (V^T (s2 * x))) of one token (d_in,)."""
    return (stage(stage(x * s2, v_signs), u_signs) * s1).to(x.dtype)


@one_token.register_fake
def _(x, u_signs, v_signs, s1, s2):
    return x.new_empty(u_signs.shape[0])


def case(d_out, d_in, rank, dtype):
    """Random arguments."""
    g = torch.Generator().manual_seed(0)
    x, s1, s2 = (torch.randn(n, generator=g).to(DEVICE, dtype) for n in (d_in, d_out, d_in))
    U, V = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((d_out, rank), (rank, d_in)))
    return x, kernels.pack_signs(U), kernels.pack_signs(V), s1, s2


def error(y, arguments, rank):
    """Relative to the reference in float64, the truth of every kernel here."""
    x, u, v, s1, s2 = (a.double() if a.is_floating_point() else a for a in arguments)
    truth = reference.binary_low_rank_linear(x, u, v, s1, s2, None, rank)
    return ((y.double() - truth).norm() / truth.norm()).item()


def main():
    # 3. The proof: several shapes, with rows that do not fill their bytes or a block, and a bound that comes from the
    # dtype. Rounding of float32 sums is about 1e-7, that of a float16 result about 3e-4.
    print("d_out  d_in  rank  dtype          error   bound")
    for d_out, d_in, rank in ((24, 64, 16), (51, 100, 37), (40, 300, 130)):
        for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            arguments = case(d_out, d_in, rank, dtype)
            found = error(one_token(*arguments), arguments, rank)
            print(f"{d_out:5}  {d_in:4}  {rank:4}  {dtype!s:13}  {found:.0e}   {bound:.0e}")
            assert found < bound

    # 4. Would the test fail? One wrong bit among thousands has to show, else it proves nothing.
    d_out, d_in, rank = 40, 300, 130
    arguments = case(d_out, d_in, rank, torch.float32)
    x, u, v, s1, s2 = arguments
    wrong = u.clone()
    wrong[7, 3] ^= 1 << 5
    print(
        f"\none wrong sign of {u.numel() * 8}: error {error(one_token(x, wrong, v, s1, s2), arguments, rank):.0e}"
    )

    # 5. What the operator promises to PyTorch: schema, fake tensors, tracing.
    tests = torch.library.opcheck(
        one_token, arguments, test_utils=("test_schema", "test_faketensor")
    )
    print(f"opcheck: {tests}")

    # 6. Why: bytes that one token has to read. A kernel that reads the packed bytes once is bound by these.
    packed = u.nbytes + v.nbytes + 2 * (d_out + d_in)
    print(f"bytes of the layer: {packed} packed, {2 * d_out * d_in} in bfloat16")

    # 7. Where it would go: a file beside `triton_dot.py` with a function of the reference's name and arguments, a line
    # in `gpu.py`, which compares it with the reference on each card before its first use, and a case in
    # `tests/interpreted_kernels.py`. A loop for CPUs goes into `cpu_kernels.cpp` beside the others.


if __name__ == "__main__":
    main()
