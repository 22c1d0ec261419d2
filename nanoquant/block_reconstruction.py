"""BlockReconstructor: one decoder block from dense to quantized (Phase 2 of the method).

Three phases for each round of linears: tune what is still dense, initialize the round's linears as factors, refine
them: latents and scales of binary ones through the straight-through estimator (Eq. 10), codebooks and scales of
looked-up ones. The loss is the squared error at the block's output, weighted per channel, against the dense block on
the dense prefix's activations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoquant.architectures import as_linear, linear_shape
from nanoquant.binary import relative_error
from nanoquant.block_config import BlockConfig, BlockReport
from nanoquant.block_tuning import BlockData, BlockTuner, scale_groups, weight_groups
from nanoquant.fit_result import FitResult
from nanoquant.heap import give_back
from nanoquant.importance import Importance, stack
from nanoquant.layer_records import BlockWatch
from nanoquant.methods import Initializer, Size, layer_of
from nanoquant.product import KMeansConfig
from nanoquant.recorder import UNRECORDED, Recorder
from nanoquant.schedules import SCHEDULES, Groups


class BlockReconstructor(nn.Module):
    """Replace a block's linears by quantized layers, round by round.

    Args:
        config: schedule, epochs, rates.
        initializer: (weight, importance, size, generator) to factors, batched; its factors decide the kind of layer.
        seed: of the start of the initializer and of the order of batches.
    """

    def __init__(self, config: BlockConfig, initializer: Initializer, seed: int = 0) -> None:
        super().__init__()
        self.config, self.initializer, self.seed = config, initializer, seed
        self.stood_for: dict[str, tuple[Tensor, Importance]] = {}

    def forward(
        self,
        block: nn.Module,
        groups: Groups,
        importances: Mapping[str, Importance],
        sizes: Mapping[str, Size],
        data: BlockData | None = None,
        *,
        name: str = "block",
        precision: str = "32-true",
        freeze: bool = True,
        loggers: list[Any] | None = None,
        recorder: Recorder = UNRECORDED,
    ) -> BlockReport:
        """Quantize ``block`` in place.

        Args:
            block: decoder block with dense linears.
            groups: names of its linears, those that share an input together, in order of execution.
            importances: name to second moments.
            sizes: name to rank, or to the shape of its codebooks.
            data: activations to tune on; may be absent when the config tunes nothing.
            name: for messages and logs.
            precision: Lightning precision of the tuning loops.
            freeze: fix signs; False keeps their latents, which training signs later starts from.
            loggers: Lightning loggers.
            recorder: takes losses, and errors of the linears after each phase.

        Raises:
            ValueError: a linear has no importance or size, or the config tunes and ``data`` is absent.
        """
        names = [linear for group in groups for linear in group]
        self.check(name, names, importances, sizes, data)
        dtypes = {name: tensor.dtype for name, tensor in _others(block, names)}
        block.requires_grad_(False)
        if self.config.tunes:
            self._prepare(block, names)
        report, watch, tuner = BlockReport(), BlockWatch(recorder, importances), None
        if self.config.tunes:
            watch.keep(block, names)
            weight = importances[names[-1]].output
            settings = (self.config.optimizer, self.seed, name, precision, loggers)
            stop = (self.config.held_out, self.config.patience)
            tuner = BlockTuner(block, data, weight, *settings, *stop)
        for round_names in SCHEDULES[self.config.schedule](groups):
            if self.config.dense_epochs:
                result = self.tune_dense(tuner, names, round_names, report)
                watch.losses("tune dense", result.losses)
                watch.tuned(block, round_names)
            errors = self.initialize(block, round_names, importances, sizes)
            watch.initialized(block, errors)
            report.weight_error |= errors
            if epochs := self.config.refine_epochs:
                watch.losses("refine", self.refine(tuner, round_names, report, epochs).losses)
                watch.refined(block, round_names)
            if freeze and not self.config.joint_epochs:
                self.freeze(block, round_names)
        if epochs := self.config.joint_epochs:
            watch.losses("refine jointly", self.refine(tuner, names, report, epochs).losses)
            watch.refined(block, names)
            if freeze:
                self.freeze(block, names)
        self.stood_for.clear()
        for other, tensor in _others(block, names):
            tensor.data = tensor.data.to(dtypes[other])
        return report

    def check(
        self,
        name: str,
        names: list[str],
        importances: Mapping[str, Importance],
        sizes: Mapping[str, Size],
        data: BlockData | None,
    ) -> None:
        """Refuse what does not suffice for the linears ``names`` of the block ``name``; raises as :meth:`forward`."""
        advice = {"importance": "collect statistics for", "size": "give a rank or codebooks to"}
        for what, given in (("importance", importances), ("size", sizes)):
            missing = [linear for linear in names if linear not in given]
            if missing:
                raise ValueError(
                    f"{name}: no {what} for {', '.join(missing)}; {advice[what]} every linear"
                )
        if self.config.reassign and any(isinstance(size, int) for size in sizes.values()):
            raise ValueError(
                f"{name}: reassign={self.config.reassign} is for weights that are looked up; signs have no indices"
            )
        if self.config.tunes and data is None:
            raise ValueError(
                f"{name}: the config tunes the block, so inputs and targets are needed; pass data, or set epochs to 0"
            )

    def _prepare(self, block: nn.Module, names: list[str]) -> None:
        """Conv1D to Linear, and copies in float32 of everything while the block is tuned."""
        for linear in names:
            block.set_submodule(linear, as_linear(block.get_submodule(linear)))
        for parameter in block.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)  # others may share it
        block.float()

    def tune_dense(
        self, tuner: BlockTuner, names: list[str], coming: tuple[str, ...], report: BlockReport
    ) -> FitResult:
        """Error propagation mitigation: tune all still dense weights before those of ``coming`` go (step 1)."""
        modules = [tuner.block.get_submodule(linear) for linear in names]
        weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
        groups = [{"params": weights, "lr": self.config.dense_lr}]
        phase = f"tune dense before {', '.join(coming)}"
        result = tuner.fit(phase, groups, self.config.dense_epochs, self.config.dense_batch)
        report.add("tune dense", result)
        return result

    def refine(
        self, tuner: BlockTuner, names: Sequence[str], report: BlockReport, epochs: int
    ) -> FitResult:
        """Factor refinement: weights and scales of the round just initialized (step 3, Eq. 10), or of all.

        Where ``config.reassign`` says so, looked-up layers choose their indices anew in between.
        """
        config = self.config
        layers = [tuner.block.get_submodule(linear) for linear in names]
        rates = (config.latent_lr, config.codebook_lr, config.relative_rates)
        groups = weight_groups(layers, *rates)
        for layer in layers:
            groups += scale_groups(layer, config.scale_lr, config.relative_rates)
        phase, result, parts = f"refine {', '.join(names)}", FitResult(), 1 + config.reassign
        for part in range(parts):
            own = epochs * (part + 1) // parts - epochs * part // parts
            result += tuner.fit(phase, groups, own, config.refine_batch)
            if part + 1 < parts:
                self.reassign(dict(zip(names, layers, strict=True)))
        report.add("refine", result)
        return result

    @torch.no_grad()
    def reassign(self, layers: Mapping[str, nn.Module]) -> None:
        """Choose the indices of looked-up layers anew, nearest to the weights they stand for."""
        beam = getattr(getattr(self.initializer, "config", None), "beam", KMeansConfig.beam)
        for name, layer in layers.items():
            layer.reassign(*self.stood_for[name], beam)

    def freeze(self, block: nn.Module, names: Sequence[str]) -> None:
        """Fix the signs of these linears."""
        for linear in names:
            block.get_submodule(linear).freeze()

    def initialize(
        self,
        block: nn.Module,
        names: tuple[str, ...],
        importances: Mapping[str, Importance],
        sizes: Mapping[str, Size],
    ) -> dict[str, float]:
        """Put factors in the place of dense linears, equal shapes in one batch; returns weight errors."""
        batches: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for linear in names:
            shape = linear_shape(block.get_submodule(linear))
            known = importances[linear]
            kinds = (known.input_correlation is None, known.output_correlation is None)
            batches[(*shape, *kinds, sizes[linear])].append(linear)
        errors = {}
        for (*_, size), linears in batches.items():
            errors |= self._factorize(block, linears, importances, size)
            give_back()  # else what these freed lies beside what the next ones take
        return errors

    def _factorize(
        self, block: nn.Module, names: list[str], importances: Mapping[str, Importance], size: Size
    ) -> dict[str, float]:
        """:meth:`initialize` of linears of one shape."""
        modules = {linear: as_linear(block.get_submodule(linear)) for linear in names}
        W = torch.stack([dense.weight.detach() for dense in modules.values()]).float()
        importance = stack([importances[linear] for linear in names], W)
        generator = torch.Generator().manual_seed(self.seed)
        factors = self.initializer(W, importance, size, generator)
        weight = importance.output.unsqueeze(-1) * importance.input.unsqueeze(-2)
        error = relative_error(W, factors.dense(), weight)
        if self.config.reassign:
            self.stood_for |= {n: (w, importances[n]) for n, w in zip(names, W, strict=True)}
        for (linear, dense), parts in zip(modules.items(), factors.unbind(), strict=True):
            if self.config.relative_rates:
                parts = parts.normalized()
            block.set_submodule(linear, layer_of(parts, dense.bias))
        return dict(zip(names, error.tolist(), strict=True))


def _others(block: nn.Module, linears: list[str]) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a block outside the linears to quantize, by name."""
    return [
        (name, tensor)
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if name.rpartition(".")[0] not in linears
    ]
