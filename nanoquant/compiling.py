"""Compiled decoder blocks for long training, where a compiler works; measurements stay uncompiled.

Blocks of one shape share one compilation, and blocks that differ in their ranks share one with symbolic ranks. On 2
CPU cores compiling takes about half a minute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from nanoquant.methods import Layer

logger = logging.getLogger(__name__)

MOST_VARIANTS = 64
"""Compilations of one function, beyond which it runs as written. Torch's own limit of 8 is too low for student and
teacher, two kinds of attention and two sizes of batch."""


def quantized_blocks(model: nn.Module) -> list[nn.Module]:
    """Members of module lists that hold quantized layers: the decoder blocks of a student, in order."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if _holds_quantized(block)]


def passed_blocks(model: nn.Module) -> list[nn.Module]:
    """Those blocks and what comes after the first of them in its list: what gradients pass."""
    quantized = quantized_blocks(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        block
        for blocks in lists
        for k, block in enumerate(blocks)
        if any(earlier in quantized for earlier in blocks[: k + 1])
    ]


def _holds_quantized(module: nn.Module) -> bool:
    return any(isinstance(layer, Layer) for layer in module.modules())


def uncompiled() -> AbstractContextManager[None]:
    """Context in which compiled blocks run as they were written; for forward passes without gradient."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def compiled(blocks: list[nn.Module], *methods: tuple[object, str]) -> Iterator[None]:
    """Context in which the forward of ``blocks`` is compiled; a warning says why where that can't be done.

    Args:
        blocks: modules on one device whose ``forward`` is not an instance attribute.
        methods: more to compile, as (object, name); not an instance attribute either.
    """
    obstacle = _obstacle(blocks)
    if obstacle:
        logger.warning("blocks train uncompiled, which is slower: %s", obstacle)
        yield
        return
    methods = (*((block, "forward") for block in blocks), *methods)
    # parameters count as constants otherwise, and every rank would be compiled on its own
    settings = {"force_parameter_static_shapes": False, "recompile_limit": MOST_VARIANTS}
    settings["optimize_ddp"] = False  # a block is small enough to wait for its gradients
    with torch._dynamo.config.patch(**settings):
        for owner, name in methods:
            setattr(owner, name, torch.compile(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name in methods:
                delattr(owner, name)


def _obstacle(blocks: list[nn.Module]) -> str:
    """Why these blocks can't be compiled; empty when they can."""
    if not blocks:
        return "no list of blocks holds the quantized layers"
    return compiler_obstacle(next(blocks[0].parameters()).device)


def compiler_obstacle(device: torch.device) -> str:
    """Why nothing can be compiled for a device; empty when it can."""
    probe = torch.zeros(8, device=device)
    try:
        torch.compile(lambda x: x + 1)(probe)
    except RuntimeError as error:
        return f"torch.compile fails here ({str(error).strip().splitlines()[0]})"
    return ""
