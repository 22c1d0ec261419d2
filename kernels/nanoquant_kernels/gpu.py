"""The product with a packed weight on CUDA: the kernel that the table names, once it has shown that it is right here.

Before its first use on a card each kernel is run on a small case and compared with the reference. One that fails, or
that can't be compiled, is not used again in this process: the log says so once, and plain PyTorch takes over.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from nanoquant_kernels import reference
from nanoquant_kernels.layout import pack_signs
from nanoquant_kernels.planes import words_of

logger = logging.getLogger(__name__)

OLDEST_TRITON = (3, 6)
OLDEST_ARCHITECTURE = 80
"""Compute capability 8.0: the first with bfloat16 on tensor cores."""
TOLERANCE = 2e-2
"""Relative error that tells a kernel that works from one that does not, whatever the dtype."""
TRIALS = (1, 16, 70)
"""Tokens with which a kernel is tried before its first use with as many or fewer; the last stands for all above."""


def binary_low_rank_linear(
    x: Tensor,
    u_signs: Tensor,
    v_signs: Tensor,
    s1: Tensor,
    s2: Tensor,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """As :func:`nanoquant_kernels.reference.binary_low_rank_linear`, by the fastest kernel that serves."""
    args = x, u_signs, v_signs, s1, s2, bias, rank
    tokens = x.numel() // s2.shape[0] if s2.shape[0] else 0
    name = choose(x.device, x.dtype, tokens) if tokens and rank else "reference"
    return run(name, *args) if name != "reference" else reference.binary_low_rank_linear(*args)


def choose(device: torch.device, dtype: torch.dtype, tokens: int) -> str:
    """Name of the kernel for ``tokens`` tokens in ``dtype`` on this device; reference where none works."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) or unavailable(device):
        return "reference"
    from nanoquant_kernels import tiles

    name = tiles.kernel_for(architecture(device), tokens)
    if dtype == torch.float32:  # tensor cores would round it
        name = "unpack"
    trial_tokens = min(t for t in TRIALS if t >= min(tokens, TRIALS[-1]))
    return name if works(name, device, dtype, trial_tokens) else "reference"


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number, such as 86."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def unavailable(device: torch.device) -> str:
    """Why no kernel can run on this device, empty if some can; logged once."""
    reason = _missing_triton()
    if not reason and architecture(device) < OLDEST_ARCHITECTURE:
        reason = (
            f"compute capability {architecture(device) / 10} is below {OLDEST_ARCHITECTURE / 10}"
        )
    if reason:
        logger.warning("packed layers run through plain PyTorch on %s: %s", device, reason)
    return reason


def _missing_triton() -> str:
    """What is wrong with the installed Triton, or nothing."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    wanted = ".".join(map(str, OLDEST_TRITON))
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old, {wanted} or newer is needed"
    return ""


def run(
    name: str, x: Tensor, u_signs: Tensor, v_signs: Tensor, s1: Tensor, *rest: Tensor | int | None
) -> Tensor:
    """Run a kernel by name with the tiles that the table has for its two stages."""
    from nanoquant_kernels import tiles, triton_dot, triton_flip, triton_unpack

    if name == "stack":
        return run_stacked(x, *([value, value] for value in (u_signs, v_signs, s1, *rest)))[1]
    if name == "unpack":
        return triton_unpack.binary_low_rank_linear(x, u_signs, v_signs, s1, *rest)
    s2, _, rank = rest
    kernel = {"dot": triton_dot, "flip": triton_flip}[name]
    arch, tokens = architecture(x.device), x.numel() // s2.shape[0]
    v_tile = tiles.tile_for(arch, name, tokens, rank, words_of(s2.shape[0]))
    u_tile = tiles.tile_for(arch, name, tokens, s1.shape[0], words_of(rank))
    return kernel.binary_low_rank_linear(x, u_signs, v_signs, s1, *rest, v_tile, u_tile)


def can_stack(
    x: Tensor,
    u_signs: list[Tensor],
    v_signs: list[Tensor],
    s1: list[Tensor],
    s2: list[Tensor],
    *_: list,
) -> bool:
    """Whether these linears of the same x can share launches on this device."""
    if x.dtype not in (torch.bfloat16, torch.float16) or unavailable(x.device):
        return False
    from nanoquant_kernels import triton_stack

    if not triton_stack.serves(x, u_signs, v_signs, s1, s2):
        return False
    return works("stack", x.device, x.dtype, min(t for t in TRIALS if t * x.shape[-1] >= x.numel()))


def run_stacked(x: Tensor, *lists: list) -> list[Tensor]:
    """Run linears of the same x in shared launches."""
    from nanoquant_kernels import tiles, triton_stack

    ranks, d_in = lists[-1], x.shape[-1]
    arch, tokens = architecture(x.device), x.numel() // d_in
    tile = tiles.tile_for(arch, "dot", tokens, sum(ranks), words_of(d_in))
    return triton_stack.binary_low_rank_linears(x, *lists, tile)


_verdicts: dict[tuple[str, torch.device, torch.dtype, int], bool] = {}


def works(name: str, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the kernel gave the reference's result on this device; asked for anew until it could be tried."""
    key = name, device, dtype, tokens
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():  # trying it needs a synchronisation
            return False
        _verdicts[key] = _try(*key)
    return _verdicts[key]


def _try(name: str, device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Compare with the reference in float64 on one small case."""
    args = trial(device, dtype, tokens)
    truth = reference.binary_low_rank_linear(
        *(t.double() if t.is_floating_point() else t for t in args[:-1]), args[-1]
    )
    try:
        error = float((run(name, *args).double() - truth).norm() / truth.norm())
    except Exception as failure:  # whatever a compiler or driver raises, the reference still works
        logger.warning(
            "kernel %s can't run on %s, plain PyTorch takes over: %s", name, device, failure
        )
        return False
    if not error <= TOLERANCE:
        logger.warning(
            "kernel %s is wrong on %s (relative error %.1e), plain PyTorch takes over; "
            "please report this with the versions of Triton and the driver",
            *(name, device, error),
        )
    return error <= TOLERANCE


def trial(device: torch.device, dtype: torch.dtype, tokens: int) -> tuple:
    """Arguments of a product of ``tokens`` tokens with a matrix (200, 512) of rank 256, aligned as most are."""
    d_out, d_in, rank = 200, 512, 256
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g)
    x, bias = torch.randn(tokens, d_in, generator=g), torch.randn(d_out, generator=g)
    s1, s2 = torch.rand(d_out, generator=g) + 0.5, torch.rand(d_in, generator=g) + 0.5
    real = [t.to(device, dtype) for t in (x, s1, s2, bias)]
    signs = [pack_signs(t).to(device) for t in (u, v)]
    return real[0], *signs, *real[1:], rank
