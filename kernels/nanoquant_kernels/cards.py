"""What a GPU can run: its architecture, a Triton that fits, and kernels that have shown that they are right on it.

Before its first use on a card a kernel runs on a small case and is compared with the reference. One that fails, or that
can't be compiled, is not used again in this process: the log says so once, and plain PyTorch takes over.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OLDEST_TRITON = (3, 6)
OLDEST_ARCHITECTURE = 80
"""Compute capability 8.0: the first with bfloat16 on tensor cores."""
MOST_TOKENS = 16
"""Tokens of a decode step that kernels for few tokens serve; more fill a GPU by each linear alone."""
TOLERANCE = 2e-2
"""Relative error that tells a kernel that works from one that does not, whatever the dtype."""


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number, such as 86."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def unavailable(device: torch.device) -> str:
    """Why no kernel can run on this device, empty if some can; logged once."""
    reason = missing_triton()
    if not reason and architecture(device) < OLDEST_ARCHITECTURE:
        found, oldest = architecture(device) / 10, OLDEST_ARCHITECTURE / 10
        reason = f"compute capability {found} is below {oldest}"
    if reason:
        logger.warning(
            "nothing runs through Triton on %s, but through plain PyTorch: %s", device, reason
        )
    return reason


def missing_triton() -> str:
    """What is wrong with the installed Triton, or nothing."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    wanted = ".".join(map(str, OLDEST_TRITON))
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old, {wanted} or newer is needed"
    return ""


_verdicts: dict[tuple[tuple, torch.device], bool] = {}
_left_out: set[tuple[tuple, torch.device]] = set()
"""What the log has named as left out of a captured graph."""


def trusted(
    kernel: tuple, device: torch.device, attempt: Callable[[], tuple[Tensor, Tensor]]
) -> bool:
    """Whether ``attempt`` gives a result close to the truth; tried once, and not while a graph is captured.

    Args:
        kernel: its name and what it is compiled for.
        device: the card.
        attempt: runs it, and gives its result and the truth.
    """
    key = kernel, device
    if key not in _verdicts:
        if torch.cuda.is_current_stream_capturing():  # trying it needs a synchronisation
            if key not in _left_out:
                _left_out.add(key)
                logger.warning(
                    "kernel %s is not in the captured graph on %s, plain PyTorch is: run once before "
                    "capturing, so that it can be tried",
                    *(name_of(kernel), device),
                )
            return False
        _verdicts[key] = _succeeds(kernel, device, attempt)
    return _verdicts[key]


def _succeeds(
    kernel: tuple, device: torch.device, attempt: Callable[[], tuple[Tensor, Tensor]]
) -> bool:
    """Try it, and log why it can't be trusted."""
    try:
        result, truth = attempt()
        error = float((result.double() - truth).norm() / truth.norm())
    except Exception as failure:  # whatever a compiler or driver raises, the reference still works
        logger.warning(
            "kernel %s can't run on %s, plain PyTorch takes over: %s",
            *(name_of(kernel), device, failure),
        )
        return False
    if not error <= TOLERANCE:
        logger.warning(
            "kernel %s is wrong on %s (relative error %.1e), plain PyTorch takes over; "
            "please report this with the versions of Triton and the driver",
            *(name_of(kernel), device, error),
        )
    return error <= TOLERANCE


def name_of(kernel: tuple) -> str:
    """Kernel and what it is compiled for, as one string."""
    return ", ".join(map(str, kernel))
