"""ADMMInitializer: latent-binary ADMM (LB-ADMM), from a weight and its importances to binary factors.

Letters follow the paper (arXiv 2602.06694, section 3.2): W~ is the preconditioned weight, U and V the continuous
factors, Z their sign-structured proxies, L (Lambda) the scaled duals, rho the penalty, lam the ridge.
Where paper and published code differ, this follows the code: the systems are built from the proxies with unit
columns, both factor updates of an iteration read the previous proxies, and duals start at factor - proxy.
Deviations of our own: W~ is divided by its root mean square first (the penalties are absolute numbers), and the
scales are refitted by least squares at the end (the mean-absolute ones are about 3 % too small). Where the importance
has correlations L of the output gradients and R of the inputs, iterations measure the error E = W~ - U V^T by them,
tr(L E R E^T); the refit and the reported errors know the diagonal only.
Everything runs in float32 and is batched over leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanoquant.binary import BinaryFactors, sign, svid
from nanoquant.budget import WIDEST
from nanoquant.importance import Importance, check_inputs
from nanoquant.second_moment import Correlation, eigenvectors


@dataclass(frozen=True, kw_only=True)
class ADMMConfig:
    """Settings of LB-ADMM; the defaults are the paper's, but for the refit."""

    iterations: int = 400
    """K, number of ADMM iterations; 100 cost about 5 % more weight error than 400."""
    ridge: float = 0.03
    """lambda, added to the penalty on the diagonal of each system."""
    power_iterations: int = 5
    """Power iterations of each rank-one magnitude step."""
    refit_sweeps: int = 2
    """Least-squares sweeps over s1 and s2 after the read-off; 0 keeps the mean absolute values of Eq. 8."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.power_iterations < 1 or self.refit_sweeps < 0:
            raise ValueError(
                "iterations and power_iterations must be at least 1 and refit_sweeps at least 0, got "
                f"{self.iterations}, {self.power_iterations}, {self.refit_sweeps}"
            )
        if not 0 < self.ridge < math.inf:
            raise ValueError(
                f"ridge must be finite and above 0 (the first iteration has no penalty), got {self.ridge}"
            )


@dataclass
class ADMMState:
    """One side of the splitting: factor P (..., m, r), its proxy Z and its scaled dual L."""

    P: Tensor
    Z: Tensor
    L: Tensor


def metric(X: Tensor, R: Correlation | None) -> Tensor:
    """R X for X (..., n, r); X where R is None."""
    return X if R is None else R.Q @ (R.spread.unsqueeze(-1) * (R.Q.mT @ X))


def unit_columns(Z: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of Z (..., m, r) scaled to unit norm, and the norms (..., 1, r)."""
    norms = Z.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(Z.dtype).tiny)
    return Z / norms, norms


class ADMMInitializer(nn.Module):
    """Factorize weights into binary factors that minimise the importance-weighted error.

    Example::

        factors = ADMMInitializer(ADMMConfig())(weight, importance, rank=320)

    Args:
        config: iteration counts and penalties.
    """

    def __init__(self, config: ADMMConfig | None = None) -> None:
        super().__init__()
        self.config = config or ADMMConfig()

    @torch.no_grad()
    def forward(
        self,
        weight: Tensor,
        importance: Importance,
        rank: int,
        generator: torch.Generator | None = None,
    ) -> BinaryFactors:
        """Factorize one weight, or a batch of equal shape and rank.

        Args:
            weight: W (..., d_out, d_in).
            importance: second moments, input (..., d_in) and output (..., d_out), all above 0.
            rank: r, at most twice the smaller dimension.
            generator: source of the Gaussian start, on the CPU; seed 0 when absent.

        Returns:
            Float32 latents and scales on the device of ``weight``.

        Raises:
            ValueError: shapes disagree, or a weight or importance is not finite and positive.
        """
        W, i, o = check_inputs(weight, importance)
        most = WIDEST * min(W.shape[-2:])
        if not 1 <= rank <= most:
            raise ValueError(f"rank must lie in 1..{most} for shape {tuple(W.shape)}, got {rank}")
        L, R = (
            None if known is None else Correlation(*(part.to(W) for part in known))
            for known in (importance.output_correlation, importance.input_correlation)
        )
        generator = generator or torch.Generator().manual_seed(0)
        D_out, D_in = o.sqrt(), i.sqrt()  # Eq. (2)
        Wt = D_out.unsqueeze(-1) * W * D_in.unsqueeze(-2)  # (..., d_out, d_in)
        rms = (
            Wt.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp_min(torch.finfo(W.dtype).tiny)
        )
        Wt = Wt / rms
        tall = (
            W.shape[-2] >= W.shape[-1]
        )  # the published code solves the transpose of wide matrices
        sides = (Wt, rank, generator, L, R) if tall else (Wt.mT, rank, generator, R, L)
        left, right = self.solve(*sides)
        factors = self.read_off(left, right, D_out if tall else D_in, D_in if tall else D_out)
        if not tall:
            factors = BinaryFactors(factors.V, factors.U, factors.s2, factors.s1)
        factors = BinaryFactors(factors.U, factors.V, factors.s1 * rms.squeeze(-1), factors.s2)
        for _ in range(self.config.refit_sweeps):
            factors = refit_scales(factors, W, i, o)
        return factors

    def solve(
        self,
        Wt: Tensor,
        rank: int,
        generator: torch.Generator,
        L: Correlation | None = None,
        R: Correlation | None = None,
    ) -> tuple[ADMMState, ADMMState]:
        """Run K iterations on W~ (..., m, n); returns the states of its left and right factor.

        L (..., m, m) and R (..., n, n) are the metrics of its sides, None for the identity.
        """
        P = metric(metric(Wt, L).mT, R).mT  # L W~ R
        left = self.start(Wt.shape[:-1], rank, generator, Wt)
        right = self.start((*Wt.shape[:-2], Wt.shape[-1]), rank, generator, Wt)
        for k in range(self.config.iterations):
            rho = k / self.config.iterations
            P_left = self.update_factor(P, right.Z, left, rho, L, R)
            P_right = self.update_factor(P.mT, left.Z, right, rho, R, L)
            left, right = self.update_proxy(P_left, left), self.update_proxy(P_right, right)
        return left, right

    def start(
        self, shape: tuple[int, ...], rank: int, generator: torch.Generator, like: Tensor
    ) -> ADMMState:
        """Gaussian factor (..., m, r), its proxy, and their difference as dual."""
        P = torch.randn(*shape, rank, generator=generator, device="cpu").to(like)
        Z = svid(P, self.config.power_iterations)
        return ADMMState(P, Z, P - Z)

    def update_factor(
        self,
        P: Tensor,
        Z_other: Tensor,
        state: ADMMState,
        rho: float,
        own: Correlation | None = None,
        other: Correlation | None = None,
    ) -> Tensor:
        """Ridge least squares of one factor against the other side's proxy, Eq. (5); returns (..., m, r).

        With metrics it is F of own F A + sigma F = B, A = X^T other X; P (..., m, n) has both metrics in it.
        """
        X, _ = unit_columns(Z_other)  # (..., n, r)
        A = X.mT @ metric(X, other)  # (..., r, r)
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        sigma = rho + self.config.ridge * mean  # mean is 1 where ``other`` is the identity
        B = X.mT @ P.mT + rho * (state.Z - state.L).mT  # (..., r, m)
        if own is not None:
            mu, Q = eigenvectors(A)
            F = Q.mT @ B @ own.Q  # (..., r, m)
            F = F / (mu.clamp_min(0).unsqueeze(-1) * own.spread.unsqueeze(-2) + sigma.unsqueeze(-1))
            return own.Q @ (Q @ F).mT
        diagonal += sigma
        factor, info = torch.linalg.cholesky_ex(A)
        if info.any():
            return torch.linalg.solve(A, B).mT
        return torch.cholesky_solve(B, factor).mT

    def update_proxy(self, P: Tensor, state: ADMMState) -> ADMMState:
        """Project the factor plus dual on sign-structured matrices, Eq. (6), and advance the dual."""
        Z = svid(P + state.L, self.config.power_iterations)
        return ADMMState(P, Z, state.L + P - Z)

    def read_off(
        self, left: ADMMState, right: ADMMState, D_left: Tensor, D_right: Tensor
    ) -> BinaryFactors:
        """Undo the preconditioners, balance both factors, and take scales and latents (Eq. 7 to 9)."""
        _, norms = unit_columns(left.Z)
        Z_left = left.Z / D_left.unsqueeze(-1)
        Z_right = right.Z / D_right.unsqueeze(-1)
        eta = (
            Z_right.norm(dim=(-2, -1), keepdim=True) / Z_left.norm(dim=(-2, -1), keepdim=True)
        ).sqrt()  # Eq. (7)
        s_left = (eta * Z_left / norms).abs().mean(-1)  # Eq. (8)
        s_right = (Z_right / eta).abs().mean(-1)
        # P + L before the last dual step: the matrix whose signs the proxy took, so signs agree exactly.
        latent_left = eta * (left.L + left.Z) / D_left.unsqueeze(-1)  # Eq. (9)
        latent_right = (right.L + right.Z) / (eta * D_right.unsqueeze(-1))
        return BinaryFactors(latent_left, latent_right, s_left, s_right)


def refit_scales(factors: BinaryFactors, W: Tensor, i: Tensor, o: Tensor) -> BinaryFactors:
    """One sweep of weighted least squares over s1, then s2, with the signs held.

    Minimises sum o_i i_j (W - s1 (U V^T) s2)_ij^2; o drops out of s1 and i out of s2.

    Args:
        factors: of the weight; signs are read, latents passed on.
        W: (..., d_out, d_in), float32.
        i: input importances (..., d_in).
        o: output importances (..., d_out).
    """
    S = sign(factors.U) @ sign(factors.V).mT  # (..., d_out, d_in)
    X = S * factors.s2.unsqueeze(-2)
    s1 = _ratio(
        (i.unsqueeze(-2) * X * W).sum(-1), (i.unsqueeze(-2) * X.square()).sum(-1), factors.s1
    )
    X = S * s1.unsqueeze(-1)
    s2 = _ratio(
        (o.unsqueeze(-1) * X * W).sum(-2), (o.unsqueeze(-1) * X.square()).sum(-2), factors.s2
    )
    return BinaryFactors(factors.U, factors.V, s1, s2)


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """Numerator / denominator where that is defined, the old scale elsewhere (a zero row of U V^T)."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-30), otherwise)
