"""What is recorded of quantized layers: errors against the dense weights, losses, flipped signs, latents.

A run without a recorder computes none of it. Shapes: W (d_out, d_in); latents U (d_out, r), V (d_in, r).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nanoquant.architectures import Decoder, as_linear
from nanoquant.heap import give_back
from nanoquant.importance import Importance
from nanoquant.mapped import forget
from nanoquant.methods import Layer, entry_of, layer_size
from nanoquant.processes import broadcast
from nanoquant.recorder import POINTS, Recorder
from nanoquant.shards import whole

SAMPLED_SIGNS = 4096
"""Signs of each latent matrix that are followed; over 200 layers a share of 2% is known to 0.01%."""
LATENT_RANGE, LATENT_BINS = 4.0, 64
"""Histograms span this many mean magnitudes to both sides, in this many bins; what lies outside is in the end bins."""
FOLLOWED_LAYERS = 4
"""Layers whose latents are kept as histograms, spread over the depth."""
SIGN_RECORDS = 8
"""How often flipped signs are counted while a model trains."""


@torch.no_grad()
def weight_error(weight: Tensor, approximation: Tensor, importance: Importance) -> float:
    """Importance-weighted relative squared error sum o i (W - A)^2 / sum o i W^2 of one layer."""
    W = weight.detach().float()
    i, o = (moment.to(W) for moment in (importance.input, importance.output))
    error = o @ (
        (W - approximation.to(W)).square_() @ i
    )  # no matrix of weights: this runs for every layer
    return float(error / (o @ (W.square() @ i)))


def layer_error(layer: Layer, weight: Tensor, importance: Importance) -> float:
    """:func:`weight_error` of a quantized layer against the dense weight (d_out, d_in)."""
    return weight_error(weight, layer.factors().dense(), importance)


@torch.no_grad()
def latent_histogram(layer: Layer) -> dict[str, list[float]]:
    """Edges (n + 1) and counts (n) of the layer's latents, in units of each matrix's mean magnitude."""
    counts = torch.zeros(LATENT_BINS)
    for latent in layer.latents():
        x = whole(latent.detach()).float()
        x = (x / x.abs().mean()).clamp(-LATENT_RANGE, LATENT_RANGE)
        counts += torch.histc(x, LATENT_BINS, -LATENT_RANGE, LATENT_RANGE).cpu()
    edges = torch.linspace(-LATENT_RANGE, LATENT_RANGE, LATENT_BINS + 1)
    return {
        "latent_edges": [round(edge, 4) for edge in edges.tolist()],
        "latent_counts": [int(count) for count in counts.tolist()],
    }


def record_model_errors(
    recorder: Recorder,
    decoder: Decoder,
    teacher: nn.Module,
    importances: Mapping[str, Importance],
) -> None:
    """Error of every quantized layer against the dense teacher's weight, after the whole model's training."""
    for block, names in enumerate(decoder.linears) if recorder.wanted else ():
        for name in names:
            layer, full = decoder.blocks[block].get_submodule(name), decoder.full_name(block, name)
            if isinstance(layer, Layer):
                dense = as_linear(teacher.get_submodule(full)).weight
                error = layer_error(layer, dense, importances[full])
                forget([dense])
                recorder.record("model", block=block, layer=full, error=error)
                give_back()


class SignSample:
    """Follows a fixed random sample of the signs of some layers."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.latents = [latent for layer in layers for latent in layer.latents()]
        generator = torch.Generator().manual_seed(0)  # of its own: recording changes no run
        self.places = [
            torch.randint(x.numel(), (min(SAMPLED_SIGNS, x.numel()),), generator=generator)
            for x in self.latents
        ]
        self.weights = torch.tensor([float(x.numel()) for x in self.latents])
        self.first = self.last = self._signs()

    def _signs(self) -> list[Tensor]:
        with torch.no_grad():
            return [
                whole(x.detach()).flatten()[p.to(x.device)].signbit().cpu()
                for x, p in zip(self.latents, self.places, strict=True)
            ]

    def flips(self) -> dict[str, float]:
        """Shares of all signs that differ from the last call's, and from the first ones."""
        last, self.last = self.last, self._signs()
        return {
            "flips": self._differing(last),
            "flips_since_start": self._differing(self.first),
        }

    def _differing(self, before: list[Tensor]) -> float:
        pairs = zip(before, self.last, strict=True)
        shares = torch.stack([(a != b).float().mean() for a, b in pairs])
        return float((shares * self.weights).sum() / self.weights.sum())


@dataclass
class BlockWatch:
    """Records the phases of one block; errors refer to the weights that it came with.

    Args:
        recorder: of this block.
        importances: of its linears.
        dense: copies of its weights, where tuning is about to change them; empty otherwise.
    """

    recorder: Recorder
    importances: Mapping[str, Importance]
    dense: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0

    def keep(self, block: nn.Module, names: Sequence[str]) -> None:
        """Remember dense weights before anything changes them."""
        if self.recorder.wanted:
            self.dense = {n: block.get_submodule(n).weight.detach().clone() for n in names}

    def losses(self, stage: str, losses: Sequence[float]) -> None:
        """Losses of one loop, thinned out; steps go on from the loop before."""
        every = -(-len(losses) // POINTS)
        for index in range(0, len(losses), every or 1):
            self.recorder.record("block", step=self.step + index, stage=stage, loss=losses[index])
        self.step += len(losses)

    def tuned(self, block: nn.Module, names: Sequence[str]) -> None:
        """How far tuning has moved dense weights, right before they are replaced."""
        for name in names if self.recorder.wanted else ():
            moved = weight_error(
                self.dense[name], block.get_submodule(name).weight, self.importances[name]
            )
            self.recorder.record("block", layer=name, step=self.step, drift=moved)

    def initialized(self, block: nn.Module, errors: Mapping[str, float]) -> None:
        """What the initializer reached; ``errors`` refer to the weights it was given."""
        for name, given in errors.items() if self.recorder.wanted else ():
            layer = block.get_submodule(name)
            weights = layer.out_features * layer.in_features
            error = self._error(layer, name) if name in self.dense else given
            self.recorder.record(
                "initialize",
                layer=name,
                **entry_of(layer_size(layer)),
                weights=weights,
                bits=layer.bits / weights,
                error=error,
                target_error=given,
            )

    def refined(self, block: nn.Module, names: Sequence[str]) -> None:
        """Errors after refinement, which minimises the block's loss and not these."""
        for name in names if self.dense else ():
            error = self._error(block.get_submodule(name), name)
            self.recorder.record("block", layer=name, step=self.step, error=error)

    def _error(self, layer: Layer, name: str) -> float:
        return layer_error(layer, self.dense[name], self.importances[name])


class ModelWatch:
    """Records the training of a whole model: flipped signs and latents now and then.

    Args:
        recorder: takes the records.
        layers: name to quantized layer; only latent ones are followed.
        steps: of the training.
        start: steps that an earlier run did and recorded; signs are then followed from there.
    """

    def __init__(
        self, recorder: Recorder, layers: Mapping[str, Layer], steps: int, start: int = 0
    ) -> None:
        wanted = broadcast(recorder.wanted)  # all help to gather what the first one records
        latent = {n: m for n, m in layers.items() if not m.frozen} if wanted else {}
        self.recorder = recorder
        self.signs = SignSample(list(latent.values())) if latent else None
        names = list(latent)
        chosen = {k * (len(names) - 1) // (FOLLOWED_LAYERS - 1) for k in range(FOLLOWED_LAYERS)}
        self.followed = {names[k]: latent[names[k]] for k in sorted(chosen)} if names else {}
        counts = {steps * k // SIGN_RECORDS for k in range(1, SIGN_RECORDS)}
        self.start, self.counts = start, sorted(step for step in counts if step > start)
        self.middle = {steps // 2} if steps // 2 >= start else set()
        if start == 0:
            self.histograms(0)

    def step(self, step: int, **metrics: float) -> None:
        """One optimizer step: its loss and rate, flips and latents when they are due."""
        if self.counts and step >= self.counts[0]:
            self.counts.pop(0)
            metrics |= self.flips()
        self.recorder.record("model", step=step, **metrics)
        if self.middle and step >= min(self.middle):
            self.middle.clear()
            self.histograms(step)

    def finish(self, steps: int) -> None:
        """The last state that training reached, before the best one is put back."""
        if flips := self.flips():
            self.recorder.record("model", step=steps, **flips)
        self.histograms(steps)

    def flips(self) -> dict[str, float]:
        """Shares of flipped signs; nothing where none can flip, and none since a start that an earlier run saw."""
        flips = self.signs.flips() if self.signs is not None else {}
        return {name: share for name, share in flips.items() if not self.start or name == "flips"}

    def histograms(self, step: int) -> None:
        """Latents of the followed layers."""
        for name, layer in self.followed.items():
            self.recorder.record("model", layer=name, step=step, **latent_histogram(layer))
