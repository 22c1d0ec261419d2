"""Importances of input and output channels of linears, of what they see of calibration text (Phase 1).

For a linear ``y = W x``, per token t, with ``g`` the gradient of the loss at ``y``:

    i_j = mean_t x_tj^2        o_i = mean_t g_ti^2        D_in = sqrt(i), D_out = sqrt(o)  # Eq. (2)

Tokens whose norm exceeds a running quantile are scaled down to it, and the moments are shrunk
towards their mean (Eq. 3). Paper: NanoQuant, arXiv 2602.06694 v3. Deviation: the loss is the sum,
not the mean, of the token losses, so that gradients do not underflow in bfloat16; the importances
are normalised to mean 1 anyway.

Shapes: N windows, T tokens a window, d_in and d_out of a linear, n tokens of one update.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from nanoquant.second_moment import (
    Correlation,
    SecondMoment,
    SecondMomentMatrix,
    correlation_of,
    shrink,
)

LOSS_CHUNK = 256
CURVATURES = ("diagonal", "inputs", "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """How calibration statistics become importances."""

    shrinkage: float = 0.2
    """Gamma of Eq. (3), 0 to 1: share of the mean in every moment (paper: 0.2; Gemma, Rnj 0.6)."""
    clip_quantile: float | None = 0.999
    """Quantile of token norms to which larger ones are clipped (paper: 0.999); 0 or None: off."""

    curvature: str = "diagonal"
    """What the initializer knows: diagonal, the second moment of each channel; inputs, how channels of an input go
    together as well, which takes 4 d_in^2 bytes for every distinct input of a linear; both, the same of the gradients
    at its output, which takes another 4 d_out^2 bytes a linear and twice the time of the initializer."""
    temper: float = 0.5
    """Inputs and both: power of the eigenvalues of the correlations; 1 trusts them fully, 0 not at all."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.curvature not in CURVATURES:
            raise ValueError(
                f"curvature must be {', '.join(CURVATURES[:-1])} or {CURVATURES[-1]}, got {self.curvature!r}"
            )
        if not 0 <= self.temper <= 1:
            raise ValueError(f"temper is {self.temper}; allowed: 0 to 1")
        if self.curvature == "diagonal" and self.temper != type(self).temper:
            raise ValueError(
                f"importance.temper={self.temper} and importance.curvature=diagonal exclude each other: nothing "
                "would be tempered; take curvature inputs or both, or leave it out"
            )
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"shrinkage is {self.shrinkage}; allowed: 0 to 1")
        if not 0 <= (self.clip_quantile or 0) < 1:
            raise ValueError(f"clip_quantile is {self.clip_quantile}; allowed: 0 to below 1, None")


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """Importances of the channels of one linear: second moments, float32, mean 1."""

    input: Tensor
    """Per input channel (d_in,), the normalised ``i``."""
    output: Tensor
    """Per output channel (d_out,), the normalised ``o``."""
    input_correlation: Correlation | None = None
    """Of the input channels; None: they are taken as independent."""
    output_correlation: Correlation | None = None
    """Of the gradients at the output channels; None: they are taken as independent."""
    scale: float = 1.0
    """Mean ``i`` times mean ``o`` before they were normalised: errors times this compare between linears."""


def stack(members: Sequence[Importance], like: Tensor) -> Importance:
    """Importances of equal shapes as a batch, in the dtype and on the device of ``like``; all or none correlated."""

    def batch(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(tensors).to(like)

    def batches(of: Sequence[Correlation | None]) -> Correlation | None:
        return None if of[0] is None else Correlation(*map(batch, zip(*of, strict=True)))

    return Importance(
        input=batch([m.input for m in members]),
        output=batch([m.output for m in members]),
        input_correlation=batches([m.input_correlation for m in members]),
        output_correlation=batches([m.output_correlation for m in members]),
    )


def check_inputs(weight: Tensor, importance: Importance) -> tuple[Tensor, Tensor, Tensor]:
    """What an initializer works on: W (..., d_out, d_in), i (..., d_in), o (..., d_out), float32, on W's device.

    Raises:
        ValueError: shapes disagree, or a weight or importance is not finite and positive.
    """
    W = weight.detach().float()
    i = importance.input.to(W.device, torch.float32)
    o = importance.output.to(W.device, torch.float32)
    if i.shape[-1:] != W.shape[-1:] or o.shape[-1:] != W.shape[-2:-1]:
        raise ValueError(
            f"importances of {tuple(i.shape)} inputs and {tuple(o.shape)} outputs do not fit a weight of "
            f"shape {tuple(W.shape)}"
        )
    if not W.isfinite().all():
        raise ValueError(f"weight of shape {tuple(W.shape)} holds non-finite values")
    for name, moment in (("input", i), ("output", o)):
        if not (moment.isfinite() & (moment > 0)).all():
            raise ValueError(
                f"{name} importances must be finite and above 0: collect them on more text"
            )
    return W, i, o


class ImportanceCollector:
    """Context manager that observes linears while the caller runs forward and backward passes.

    Args:
        linears: Linears (``nn.Linear`` or ``Conv1D``) by full name.
        config: Clipping and shrinkage.

    Example::

        with ImportanceCollector(decoder.linear_modules(), ImportanceConfig()) as collector:
            model(input_ids=ids, labels=ids).loss.backward()
        importances = collector.importances()
    """

    def __init__(self, linears: dict[str, nn.Module], config: ImportanceConfig) -> None:
        self.linears = linears
        self.config = config
        shared, own = config.curvature != "diagonal", config.curvature == "both"
        self.inputs, self.gradients = (
            {
                name: (SecondMomentMatrix if pairs else SecondMoment)(config.clip_quantile)
                for name in linears
            }
            for pairs in (shared, own)
        )
        self._readers = WeakTensorKeyDictionary()  # who added a tensor first, while it lives
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ImportanceCollector":
        """Add the hooks."""
        for name, module in self.linears.items():
            hook = functools.partial(self._after_forward, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def importances(self, release: bool = False) -> dict[str, Importance]:
        """Clipped, shrunk and normalised importances of every linear, by full name.

        Args:
            release: Free each matrix of second moments as soon as it is read; nothing more can be added then.

        Raises:
            ValueError: A linear has no statistics, or all of its inputs or gradients are zero.
        """
        found: dict[int, Correlation | None] = {}
        for what, moments in (("inputs", self.inputs), ("output gradients", self.gradients)):
            for moment in moments.values():
                if (
                    not isinstance(moment, SecondMomentMatrix)
                    or id(moment) in found
                    or not moment.tokens
                ):
                    continue
                readers = [n for n, other in moments.items() if other is moment]
                found[id(moment)] = correlation_of(
                    moment.matrix(),
                    self.config.shrinkage,
                    self.config.temper,
                    f"{what} of {', '.join(readers)}",
                )
                if release:
                    moment.release()
        return {name: self._importance(name, found) for name in self.linears}

    def _importance(self, name: str, found: dict[int, Correlation | None]) -> Importance:
        """Of one linear."""
        i, mean_i = self._finish(self.inputs[name], name, "input activations")
        o, mean_o = self._finish(self.gradients[name], name, "output gradients")
        correlations = (found.get(id(m[name])) for m in (self.inputs, self.gradients))
        return Importance(i, o, *correlations, scale=mean_i * mean_o)

    def _after_forward(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> None:
        """Add the input of a linear, and wait for the gradient of its output; not in a pass without gradients."""
        if not torch.is_grad_enabled():
            return
        x = args[0] if args else kwargs["input"]
        first = name if self.config.curvature == "diagonal" else self._readers.setdefault(x, name)
        if first == name:
            self._add(self.inputs[name], x.detach(), name, "input activations")
        else:
            self.inputs[name] = self.inputs[first]
        if output.requires_grad:
            add = functools.partial(self._add, self.gradients[name])
            output.register_hook(functools.partial(add, name=name, what="output gradients"))

    @staticmethod
    def _add(moment: SecondMoment, z: Tensor, name: str, what: str) -> None:
        """Add token vectors (..., d) of a linear, and name them if they are not finite."""
        try:
            moment.update(z.reshape(-1, z.shape[-1]))
        except ValueError as error:
            raise ValueError(f"{what} of {name} are {error}") from None

    def _finish(self, moment: SecondMoment, name: str, what: str) -> tuple[Tensor, float]:
        """Shrink one moment and normalise it to mean 1; its mean before comes with it."""
        if moment.tokens == 0:
            raise ValueError(
                f"{name} has no statistics of its {what}: run the model forward and backward on "
                "calibration text while the collector is active"
            )
        value = shrink(moment.value(), self.config.shrinkage)
        mean = value.mean()
        if mean == 0:
            raise ValueError(
                f"{what} of {name} are all zero; the layer does not act on the loss of this text, "
                "so it has no importances: leave it out or use other text"
            )
        if not (value > 0).all():
            raise ValueError(
                f"{what} of {name} are zero in {int((value <= 0).sum())} of {len(value)} channels, which importance."
                f"shrinkage={self.config.shrinkage} leaves so; take {type(self.config).shrinkage}, or other text"
            )
        return value / mean, float(mean)


@torch.no_grad()
def cross_entropy_gradient(logits: Tensor, ids: Tensor) -> Tensor:
    """Gradient, at the logits, of the summed next-token cross entropy: softmax - one_hot.

    Written out so that no float32 copy of all logits is ever held.

    Args:
        logits: (B, T, vocabulary); position t predicts token t + 1.
        ids: Token ids (B, T).

    Returns:
        (B, T, vocabulary) in the dtype of the logits; zero at the last position.
    """
    gradient = torch.zeros_like(logits)
    for row, target, out in zip(logits[:, :-1], ids[:, 1:], gradient[:, :-1], strict=True):
        for first in range(0, len(row), LOSS_CHUNK):
            chunk = slice(first, first + LOSS_CHUNK)
            p = row[chunk].float().softmax(-1)  # (chunk, vocabulary)
            p[torch.arange(len(p), device=p.device), target[chunk].to(p.device)] -= 1
            out[chunk] = p
    return gradient
