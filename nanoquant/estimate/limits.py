"""``--max-memory``: a plan that fits, or what would, said before anything is computed.

The plan may put activations between blocks on the disk, which changes no result. All else is for the user to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nanoquant.budget import rank_limits
from nanoquant.config import NanoQuantConfig
from nanoquant.estimate.memory import needs
from nanoquant.estimate.quantities import Quantities
from nanoquant.estimate.subject import Subject
from nanoquant.estimate.terms import ACTIVATIONS, Need, Use
from nanoquant.file_budget import file_options
from nanoquant.methods import method_of
from nanoquant.units import amount, parse_bytes

PLACES = {False: "--max-memory", True: "--max-gpu-memory"}
"""Flags by whether they are about the GPU."""
Change = Callable[[NanoQuantConfig], NanoQuantConfig]


def _stage(name: str, **fields: object) -> Change:
    """A change of fields of a stage of the configuration."""

    def change(config: NanoQuantConfig) -> NanoQuantConfig:
        return dataclasses.replace(
            config, **{name: dataclasses.replace(getattr(config, name), **fields)}
        )

    return change


def _optimizer(config: NanoQuantConfig) -> NanoQuantConfig:
    """Moments of 8 bits in the whole-model phase."""
    narrow = dataclasses.replace(config.model.optimizer, state_bits=8)
    return _stage("model", optimizer=narrow)(config)


CHANGES: dict[str, Change] = {
    "--model.shard": _stage("model", shard=True),
    "--model.train scales": _stage("model", train="scales"),
    "--model.optimizer.state_bits 8": _optimizer,
    "--model.recompute": _stage("model", recompute=True),
    "--model.batch 1": _stage("model", batch=1),
    "--calibration.batch 1": _stage("calibration", batch=1),
    "--self_text.batch 1": _stage("self_text", batch=1),
    "--importance.curvature diagonal": _stage("importance", curvature="diagonal"),
    "--model.compile_from null": _stage("model", compile_from=None),
    "--run.offload": _stage("run", offload=True),
}
"""Settings that make a run smaller, at the cost of quality or time; each is tried alone, then all."""


@dataclass(frozen=True)
class Plan:
    """A run's memory."""

    subject: Subject
    """The model."""
    config: NanoQuantConfig
    """Of the run."""
    use: Use
    """How the command runs."""

    def needs(self) -> list[Need]:
        """What each phase takes."""
        return needs(quantities(self.subject, self.config, self.use))

    def least(self, device: bool) -> int:
        """Smallest memory that would do: with all activations between blocks on the disk."""
        return max(need.bytes(device) - _movable(need, device) for need in self.needs())


def quantities(subject: Subject, config: NanoQuantConfig, use: Use) -> Quantities:
    """Quantities of a run; of several storages of the embedding that a file's budget leaves, the middle one.

    Raises:
        ValueError: the bits can't be met.
    """
    options = file_options(subject.model, subject.decoder, subject.chosen, subject.shapes, config)
    option = options[len(options) // 2]
    sizes = method_of(option).plan(subject.shapes, option)
    most = (
        sizes
        if option.budget.allocation == "uniform"
        else rank_limits(subject.shapes, option.budget).cap
    )
    storages = tuple(found.embedding for found in options)
    return Quantities(subject, option, sizes, dict(most), use, storages)


def fit(
    subject: Subject, config: NanoQuantConfig, use: Use, memory: str | None, gpu: str | None
) -> NanoQuantConfig:
    """The configuration with a limit for activations in memory, where that is what it takes to keep a promise.

    Args:
        subject: the model.
        config: as asked.
        use: how the command runs.
        memory: most main memory, such as 16GB; None: any.
        gpu: the same of the GPU.

    Raises:
        ValueError: the run has no GPU to promise for; or it can't be kept: with the phase, its largest term, the
            smallest memory that would do, and settings that change it.
    """
    if gpu is not None and not use.gpu:
        raise ValueError(
            f"{PLACES[True]} {gpu} and a run on the CPU exclude each other: take run.accelerator=cuda or leave it out"
        )
    plan = Plan(subject, config, use)
    room: list[int] = []
    for device, text in ((False, memory), (True, gpu)):
        if text is None:
            continue
        limit = parse_bytes(text, PLACES[device])
        for need in plan.needs():
            movable, size = _movable(need, device), need.bytes(device)
            if size - movable > limit:
                raise ValueError(_refusal(plan, need, limit, device))
            if size > limit:
                room.append(limit - size + movable)
    if not room:
        return config
    return _stage("run", activation_memory=f"{max(1, min(room))}B")(config)


def _movable(need: Need, device: bool) -> int:
    """Bytes of a phase that may lie on the disk."""
    return sum(term.bytes for term in need.on(device) if term.change == ACTIVATIONS)


def _refusal(plan: Plan, need: Need, limit: int, device: bool) -> str:
    """What to say when a phase does not fit."""
    terms = [term for term in need.on(device) if term.change != ACTIVATIONS]
    least = plan.least(device)
    text = (
        f"{PLACES[device]} {amount(limit)} can't be kept: the phase {need.phase!r} takes "
        f"{amount(sum(term.bytes for term in terms))}, of it {amount(terms[0].bytes)} for {terms[0].name}; the "
        f"smallest that would do is {amount(least)}"
    )
    smaller = _alternatives(plan, least, device)
    return text + (f", or {'; '.join(smaller)}" if smaller else "")


def _alternatives(plan: Plan, least: int, device: bool) -> list[str]:
    """Settings that lower the smallest memory, each with what it would be, and all of them together."""
    found, all_of, exclusive = [], plan.config, False
    for flag, change in CHANGES.items():
        if (changed := _changed(plan.config, change)) is None:
            continue
        size = Plan(plan.subject, changed, plan.use).least(device)
        if size < least:
            found.append(f"{amount(size)} with {flag}")
            together = _changed(all_of, change)
            all_of, exclusive = together or all_of, exclusive or together is None
    if len(found) > 1 and not exclusive:
        found.append(
            f"{amount(Plan(plan.subject, all_of, plan.use).least(device))} with all of these"
        )
    return found


def _changed(config: NanoQuantConfig, change: Change) -> NanoQuantConfig | None:
    """A configuration with a change; None where other settings exclude it."""
    try:
        return change(config)
    except ValueError:
        return None
