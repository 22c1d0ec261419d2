"""Second moments of token vectors: clipped, shrunk, of single entries or of all pairs, and the correlation of these.

Shapes: n tokens of one update, d entries. Tempering a correlation, that is a power below 1 of its eigenvalues at the
same trace, insures against too few tokens. The paper knows the diagonal only.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def clip_threshold(norms: Tensor, quantile: float) -> Tensor:
    """Norm above which tokens are clipped: the k-th largest, k = max(1, int(n (1 - quantile))).

    Args:
        norms: Token norms (n,).
        quantile: Share of the tokens, 0 to 1, to stay as they are.
    """
    k = max(1, int(norms.numel() * (1 - quantile)))
    return norms.topk(k).values[-1]


def clip_tokens(z: Tensor, tau: float) -> Tensor:
    """Scale every token of z (n, d) whose Euclidean norm exceeds tau down to that norm."""
    norms = z.norm(dim=1, keepdim=True)
    return z * (tau / norms).clamp(max=1)


def shrink(moment: Tensor, gamma: float) -> Tensor:
    """Pull the moments (d,) towards their mean: (1 - gamma) m + gamma mean(m)."""
    return (1 - gamma) * moment + gamma * moment.mean()  # Eq. (3)


def eigenvectors(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., d) of a symmetric A (..., d, d) and its eigenvectors, in float64 where float32 fails.

    Raises:
        torch.linalg.LinAlgError: that fails as well.
    """
    try:
        return torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:
        values, Q = torch.linalg.eigh(A.double())
        return values.to(A), Q.to(A)


class Correlation(NamedTuple):
    """Tempered correlation of channels, R = Q diag(spread) Q^T, by its eigenvectors."""

    Q: Tensor
    """(d, d), orthogonal."""
    spread: Tensor
    """(d,), at least 0, mean 1."""


def correlation_of(moment: Tensor, gamma: float, power: float, name: str) -> Correlation | None:
    """Shrink a second moment (d, d), divide it by the roots of its diagonal, and temper its eigenvalues.

    Args:
        moment: of inputs or gradients.
        gamma: shrinkage.
        power: of the eigenvalues.
        name: of what it is, for the warning.

    Returns:
        None, with a warning, where the moment or its eigenvalues are not finite: the diagonal has to do.
    """
    mean = moment.diagonal().mean()
    moment = (1 - gamma) * moment
    moment.diagonal().add_(gamma * mean)
    root = moment.diagonal().sqrt()
    R = moment / (root.unsqueeze(-1) * root)
    try:
        spread, Q = eigenvectors(R)
    except torch.linalg.LinAlgError:
        spread, Q = R.new_full((len(R),), float("nan")), R
    spread = spread.clamp_min(0) ** power
    spread = spread * (len(R) / spread.sum())
    if not (spread.isfinite().all() and Q.isfinite().all()):
        logger.warning(
            "the correlation of the %s is not finite; the initializer takes the diagonal",
            name,
        )
        return None
    return Correlation(
        Q.contiguous(), spread
    )  # as a file gives it back: products depend on the layout


class SecondMoment:
    """Mean over tokens of the squared entries of clipped token vectors.

    The threshold tau is the running maximum of the thresholds of the updates; when it grows, the
    earlier sum is multiplied by (tau_new / tau_old)^2.

    Args:
        quantile: Quantile of the token norms of one update that sets tau; 0 or None does not clip.
    """

    def __init__(self, quantile: float | None) -> None:
        self.quantile = quantile
        self.tau = 0.0
        self.tokens = 0
        self._sum: Tensor | None = None

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """Add the tokens z (n, d).

        Raises:
            ValueError: z holds a value that is not finite.
        """
        if not len(z):  # an expert that no token was sent to
            return
        z = z.float()
        norms = z.norm(dim=1)
        largest = norms.max().item()
        # NaN compares false with everything, and max() propagates it
        if not largest < float("inf"):
            raise ValueError("not finite (NaN or infinity)")
        if self.quantile:
            self._raise_threshold(clip_threshold(norms, self.quantile).item())
            if largest > self.tau > 0:
                z = clip_tokens(z, self.tau)
        self._sum = self._added(self._sum, z)
        self.tokens += len(z)

    def _added(self, total: Tensor | None, z: Tensor) -> Tensor:
        """The sum so far, with the tokens z (n, d)."""
        return z.square().sum(0) if total is None else total + z.square().sum(0)

    def value(self) -> Tensor:
        """Mean over the tokens (d,), float32.

        Raises:
            ValueError: No token has been added.
        """
        if self._sum is None:
            raise ValueError("no statistics")
        return self._sum / self.tokens

    def _raise_threshold(self, tau: float) -> None:
        """Let the threshold grow, never shrink, and bring the earlier sum to its scale."""
        if tau > self.tau:
            if self._sum is not None and self.tau > 0:
                self._sum *= (tau / self.tau) ** 2
            self.tau = tau


class SecondMomentMatrix(SecondMoment):
    """The same, of the products of all pairs of entries."""

    _released = False

    def _added(self, total: Tensor | None, z: Tensor) -> Tensor:
        """The sum so far, with the products z z^T (d, d) of the tokens z (n, d); in place."""
        return z.T @ z if total is None else total.addmm_(z.T, z)

    def value(self) -> Tensor:
        """Mean over the tokens of the squares (d,)."""
        return super().value() if self._released else self.matrix().diagonal()

    def release(self) -> None:
        """Free the products of different entries: afterwards there is no :meth:`matrix`, and no update."""
        if self._sum is not None and not self._released:
            self._sum, self._released = self._sum.diagonal().clone(), True

    def matrix(self) -> Tensor:
        """Mean over the tokens of the products (d, d), float32; errors as of :meth:`SecondMoment.value`."""
        return super().value()
