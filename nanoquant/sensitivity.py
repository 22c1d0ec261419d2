"""Sensitivity: what the model loses when one group of linears is binary, and how that falls with rank.

A group is the linears of a block that read the same tensor. Its loss is the KL divergence of the model with this
group alone binary, by a short ADMM at uniform ranks, from the dense model, in nats per token. It is split among the
group's linears by their errors sum o i (W - A)^2, and the errors at some more ranks tell how it falls with rank.
Every group is written to a file as it comes, and what the file has is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nanoquant.allocation import Response, fit_response
from nanoquant.architectures import Decoder, as_linear
from nanoquant.budget import largest_rank
from nanoquant.commit import refused
from nanoquant.dense_prefix import DensePrefix
from nanoquant.digest import model_digest
from nanoquant.divergence import ForwardKL
from nanoquant.importance import Importance, stack
from nanoquant.json_files import parse_json, read_text, write_json
from nanoquant.mapped import forget
from nanoquant.methods import Initializer
from nanoquant.offload import at_work
from nanoquant.processes import first, on_first

logger = logging.getLogger(__name__)

FORMAT, SUFFIX = 1, ".json"


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """How ranks are measured before they are chosen; for budget.allocation=measured."""

    iterations: int = 20
    """ADMM iterations of a factorization that is only measured."""
    windows: int = 2
    """Calibration windows on which losses are measured, in one pass; at most as many as there are."""
    length: int = 256
    """Most tokens of each of those windows."""
    spread: float = 0.0
    """Errors are measured at 1 - spread, 1 and 1 + spread times the uniform rank; 0: at it alone, and loss ~ 1/rank,
    for a third of the time and, on a model of 135M, no less quality."""
    remains: float = 0.2
    """Share of the sum of all losses that reconstruction leaves, where embedding.bits null weighs the linears against
    the embedding; on a model of 135M, with independent inputs and uniform ranks, training left 0.23 of it at 1.0 bit
    and 0.18 at 0.55."""

    def __post_init__(self) -> None:
        if min(self.iterations, self.windows) < 1 or self.length < 2:
            raise ValueError(
                f"iterations and windows must be at least 1 and length at least 2, got {self.iterations}, "
                f"{self.windows} and {self.length}"
            )
        if not 0 <= self.spread < 1:
            raise ValueError(f"spread must lie in 0 to below 1, got {self.spread}")
        if not 0 < self.remains <= 1:
            raise ValueError(f"remains must lie above 0 and at most at 1, got {self.remains}")


@dataclass(frozen=True)
class GroupLoss:
    """What was measured of one group."""

    divergence: float
    """Nats per token with the group binary at its uniform ranks."""
    errors: dict[str, dict[int, float]]
    """Full name of a linear and rank to its weighted error, comparable within the model; empty for the embedding."""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> GroupLoss:
        """From its dictionary, whose ranks JSON made texts."""
        errors = {
            name: {int(rank): float(error) for rank, error in row.items()}
            for name, row in found["errors"].items()
        }
        divergence = float(found["divergence"])
        figures = [divergence, *(error for row in errors.values() for error in row.values())]
        if not all(0 <= figure < math.inf for figure in figures):
            raise ValueError(f"a figure is not finite and at least 0: {found}")
        return cls(divergence, errors)


def check_place(place: str | Path) -> None:
    """Refuse a file of another kind in the place of measured losses.

    Raises:
        ValueError: names it.
    """
    if Path(place).is_file() and Path(place).suffix != SUFFIX:
        raise ValueError(
            f"sensitivity_file {place} is a file, but no {SUFFIX} one; give a {SUFFIX} file, or a folder"
        )


class SensitivityFile:
    """Groups measured so far, in memory and in a JSON file.

    Args:
        path: a .json file, or a folder, there or to be made, for one named by the fingerprint; None keeps nothing
            beyond this object.
        fingerprint: of all that decides a measurement; a file with another one is measured anew.
    """

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = None if path is None else Path(path), fingerprint
        if self.path is not None and (self.path.suffix != SUFFIX or self.path.is_dir()):
            self.path /= f"sensitivity-{fingerprint[:12]}{SUFFIX}"
        self.groups: dict[str, GroupLoss] = on_first(self._read)

    def add(self, key: str, group: GroupLoss) -> None:
        """Keep a group; the file is whole before and after.

        Raises:
            OSError: the disk refuses it.
        """
        self.groups[key] = group
        groups = {key: asdict(group) for key, group in self.groups.items()}
        content = {"format": FORMAT, "fingerprint": self.fingerprint, "groups": groups}
        if self.path is None or not first():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(str(self.path), content)
        except OSError as error:
            raise refused(self.path, error) from error

    def _read(self) -> dict[str, GroupLoss]:
        if self.path is None or not self.path.is_file():
            return {}
        try:
            found = parse_json(read_text(self.path))
            same = (found["format"], found["fingerprint"]) == (FORMAT, self.fingerprint)
            groups = {k: GroupLoss.from_json(group) for k, group in found["groups"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            logger.warning("%s is damaged (%r); all groups are measured again", self.path, error)
            return {}
        if not same:
            logger.warning(
                "%s was measured with another model, text or setting; all groups are measured again",
                self.path,
            )
            return {}
        logger.info("%s has %d measured groups; they are kept", self.path, len(groups))
        return groups


class SensitivityProbe:
    """Measures groups of a dense model, which is the same again after each.

    Args:
        model: dense, on its device.
        decoder: its blocks.
        ranks: their uniform ranks.
        step: ranks are multiples of this.
        bits: that limit ranks, see :func:`largest_rank`.
        windows: token ids (N, T) on which losses are measured.
        spread: of :class:`SensitivityConfig`.
        initializer: a short ADMM, or one of the caller.
        seed: of its start.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        ranks: Mapping[str, int],
        step: int,
        bits: float,
        windows: Tensor,
        spread: float,
        initializer: Initializer,
        seed: int = 0,
    ) -> None:
        self.decoder, self.ranks, self.step = decoder, ranks, step
        self.bits, self.spread, self.initializer, self.seed = bits, spread, initializer, seed
        self.dense = DensePrefix(model, decoder, windows)

    def measure(
        self, block: int, names: tuple[str, ...], importances: Mapping[str, Importance]
    ) -> GroupLoss:
        """Loss of one group of a block, and errors of its linears, whose importances are given by full name.

        Raises:
            ValueError: the model gives non-finite logits with this group binary; names it.
        """
        binary, errors = {}, {}
        with at_work(self.decoder.blocks[block]):
            for name in names:
                full = self.decoder.full_name(block, name)
                binary[name], errors[full] = self._factorize(block, name, full, importances[full])
            forget(self.decoder.blocks[block].parameters())
            with _replaced(self.decoder.blocks[block], binary):
                logits = self.dense.logits_from(block)
        divergence = float(ForwardKL.apply(logits.flatten(0, 1), self.dense.logits.flatten(0, 1)))
        if not divergence < math.inf:
            raise ValueError(
                f"the divergence with {', '.join(errors)} binary is {divergence}; take budget.allocation=prior"
            )
        return GroupLoss(max(divergence, 0.0), errors)

    def _factorize(
        self, block: int, name: str, full: str, importance: Importance
    ) -> tuple[Tensor, dict[int, float]]:
        """The approximation (d_out, d_in) at the uniform rank, and the errors at all ranks."""
        W = as_linear(self.decoder.blocks[block].get_submodule(name)).weight.detach().float()
        uniform = self.ranks[full]
        i, o = importance.input.to(W), importance.output.to(W)
        found, errors = W, {}
        for rank in probed_ranks(tuple(W.shape), uniform, self.step, self.spread, self.bits):
            generator = torch.Generator().manual_seed(self.seed)
            A = self.initializer(W.unsqueeze(0), stack([importance], W), rank, generator).dense()[0]
            errors[rank] = importance.scale * float(o @ ((W - A).square() @ i))
            if not errors[rank] < math.inf:
                raise ValueError(
                    f"the error of {full} at rank {rank} is {errors[rank]}; take budget.allocation=prior"
                )
            found = A if rank == uniform else found
        return found, errors


def probed_ranks(
    shape: tuple[int, int], uniform: int, step: int, spread: float, bits: float
) -> list[int]:
    """Ranks at which errors are measured, ascending: the uniform one, and those around it that differ."""
    if not spread:
        return [uniform]
    below = max(math.floor((1 - spread) * uniform / step + 0.5) * step, min(step, uniform))
    above = math.ceil((1 + spread) * uniform / step - 0.5) * step
    above = min(above, largest_rank(*shape, step, bits))
    return sorted({min(below, uniform), uniform, max(above, uniform)})


@contextmanager
def _replaced(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, linears of a block have other weights (d_out, d_in)."""
    modules = {name: block.get_submodule(name) for name in weights}
    before = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            W = weights[name].mT if isinstance(module, Conv1D) else weights[name]
            module.weight.data = W.to(before[name].dtype).contiguous()
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = before[name]


def responses(groups: Mapping[str, GroupLoss], ranks: Mapping[str, int]) -> dict[str, Response]:
    """Loss over rank of every linear, by full name: its share of its group's loss, falling as its error.

    Args:
        groups: as measured.
        ranks: uniform ranks, at which their losses were.
    """
    found = {}
    for group in (group for group in groups.values() if group.errors):
        at_uniform = {name: errors[ranks[name]] for name, errors in group.errors.items()}
        total = max(sum(at_uniform.values()), 1e-30)
        for name, errors in group.errors.items():
            share = group.divergence * at_uniform[name] / total
            found[name] = fit_response(errors, share, ranks[name])
    return found


def fingerprint(model: nn.Module, tokens: Tensor, settings: Mapping[str, Any]) -> str:
    """Digest of what decides a measurement.

    Args:
        model: dense, see :func:`model_digest`.
        tokens: all windows that importances and losses are taken from.
        settings: plain values.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(f"{model_digest(model)} {tuple(tokens.shape)}".encode())
    digest.update(tokens.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
