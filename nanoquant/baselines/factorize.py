"""From one weight to signs and scales, without calibration. Shapes: W (d_out, d_in), rank r, all float32.

Sources: XNOR-Net (arXiv 1603.05279), OneBit (arXiv 2402.11295), LittleBit (arXiv 2506.13771).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoquant.admm import refit_scales
from nanoquant.binary import BinaryFactors, rank_one

POWER_ITERATIONS = 20
REFIT_SWEEPS = 2


def row_scales(W: Tensor) -> Tensor:
    """Scale of each row (d_out,) of the binary weight network of XNOR-Net: mean |w| of the row.

    With B = sign(W) it minimizes |W - alpha B|^2 over alpha and B (XNOR-Net, Eq. 6).
    """
    return W.abs().mean(-1)


def row_and_column_scales(W: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of rows (d_out,) and columns (d_in,) that minimize |W - a b^T * sign(W)|^2.

    XNOR-Net's second scale belongs to binary inputs, which weights alone don't have; here a scale of each column of W
    takes its place. The minimum is the best rank-one approximation of |W| (sign-value independent decomposition of
    OneBit), by power iteration from the row sums: its first half step already fits columns to :func:`row_scales`.
    """
    return rank_one(W.abs(), POWER_ITERATIONS)


def truncated_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left (d_out, r) and right (d_in, r) factor of the best rank-r approximation, sqrt(S) in each."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, Vh[:rank].mT * root


def sign_svd(W: Tensor, rank: int) -> BinaryFactors:
    """Signs of the truncated SVD's factors; s1 and s2 by alternating least squares against W."""
    U, V = truncated_svd(W, rank)
    factors = BinaryFactors(U, V, W.new_ones(W.shape[0]), W.new_ones(W.shape[1]))
    every_input, every_output = W.new_ones(W.shape[1]), W.new_ones(W.shape[0])
    for _ in range(REFIT_SWEEPS):
        factors = refit_scales(factors, W, every_input, every_output)
    return factors


def dual_svid(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LittleBit's initialization: U, V, s1 (d_out,), middle (r,), s2 (d_in,).

    Both factors of the truncated SVD become their signs times the best rank-one approximation of their magnitudes:
    |U| ~ s1 l^T and |V| ~ s2 m^T, and the scale of a rank is l * m. One path, without LittleBit's residual path.
    """
    U, V = truncated_svd(W, rank)
    s1, left = rank_one(U.abs(), POWER_ITERATIONS)
    s2, right = rank_one(V.abs(), POWER_ITERATIONS)
    return U, V, s1, left * right, s2
