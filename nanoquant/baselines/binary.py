"""Binary baselines: one matrix of signs, or two thin ones at the bits of ours."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from nanoquant.admm import ADMMInitializer
from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.factorize import dual_svid, row_and_column_scales, row_scales, sign_svd
from nanoquant.baselines.layers import MiddleScaleLinear, SignLinear
from nanoquant.baselines.target import Target
from nanoquant.budget import (
    SCALE_BITS,
    BudgetConfig,
    allocate_ranks,
    body_bits,
    largest_rank,
    rank_limits,
    uniform_ranks,
)
from nanoquant.calibration import collect_importances
from nanoquant.config import CalibrationConfig, nanoquant_config
from nanoquant.packed_linear import PackedBinaryLinear


def rtn1(target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
    """Binary weight network: signs and the mean magnitude of each row."""
    target.replace(lambda name, W, bias: SignLinear(W, row_scales(W), None, bias))


def xnor(target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
    """Signs, with a scale for each row and each column."""
    target.replace(lambda name, W, bias: SignLinear(W, *row_and_column_scales(W), bias))


def sign_of_svd(target: Target, config: BaselineConfig, windows: Tensor | None) -> None:
    """Signs of the truncated SVD's factors, at the ranks of the budget."""
    ranks = svd_ranks(target.shapes, config.bits)

    def make(name: str, W: Tensor, bias: Tensor | None) -> nn.Module:
        return PackedBinaryLinear.from_factors(sign_svd(W, ranks[name]), bias)

    target.replace(make)


def dual_svid_initialization(
    target: Target, config: BaselineConfig, windows: Tensor | None
) -> None:
    """LittleBit's initialization, at ranks whose middle scales fit into the budget too."""
    ranks = ranks_with_middle(target.shapes, config.bits)

    def make(name: str, W: Tensor, bias: Tensor | None) -> nn.Module:
        return MiddleScaleLinear(*dual_svid(W, ranks[name]), bias)

    target.replace(make)


def nanoquant_initialization(
    target: Target, config: BaselineConfig, windows: Tensor | None
) -> None:
    """The paper's ADMM initialization, with our iterations and refit, at uniform ranks, and no phase after it."""
    ours = nanoquant_config(bits=config.bits, importance={"curvature": "diagonal"})
    ranks = allocate_ranks(target.shapes, ours.budget)
    importances = collect_importances(
        target.model, target.decoder, windows, ours.importance, CalibrationConfig.batch
    )
    generator = torch.Generator().manual_seed(config.seed)
    initializer = ADMMInitializer(ours.admm)

    def make(name: str, W: Tensor, bias: Tensor | None) -> nn.Module:
        factors = initializer(W, importances[name], ranks[name], generator)
        return PackedBinaryLinear.from_factors(factors, bias)

    target.replace(make)


def plain_ranks(shapes: dict[str, tuple[int, int]], bits: float) -> dict[str, int]:
    """Ranks of our own budget.

    Raises:
        ValueError: the budget does not suffice for the smallest ranks.
    """
    return allocate_ranks(shapes, BudgetConfig(bits=bits))


def svd_ranks(shapes: dict[str, tuple[int, int]], bits: float) -> dict[str, int]:
    """Ranks of our own budget as far as a truncated SVD goes: the smaller dimension.

    Raises:
        ValueError: the bits are fewer than the smallest ranks take, or more than full rank does; by how much.
    """
    limits = rank_limits(shapes, BudgetConfig(bits=bits))
    full = {name: largest_rank(*shape, limits.step, 1.0) for name, shape in shapes.items()}
    most = body_bits(shapes, full)
    if bits > most:
        raise ValueError(
            f"bits={bits} is {bits - most:.4f} more than full rank takes with these shapes, and an SVD has no "
            f"more: ask for at most {most:.4f}; nanoquant-init goes beyond"
        )
    return uniform_ranks(shapes, bits, dataclasses.replace(limits, cap=full))


def ranks_with_middle(shapes: dict[str, tuple[int, int]], bits: float) -> dict[str, int]:
    """Ranks that take at most ``bits`` per weight when each rank stores a scale besides its signs.

    Raises:
        ValueError: the budget does not suffice for the smallest ranks.
    """
    weights = sum(d_out * d_in for d_out, d_in in shapes.values())
    left = bits
    while True:
        try:
            ranks = svd_ranks(shapes, left)
        except ValueError as error:
            if left == bits:
                raise
            raise ValueError(
                f"bits={bits} does not suffice for a scale a rank beside the signs: {error}"
            ) from None
        used = body_bits(shapes, ranks) + SCALE_BITS * sum(ranks.values()) / weights
        if used <= bits:
            return ranks
        left -= used - bits
