"""The estimate as text, and as plain values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nanoquant.commands import kind_of, summary
from nanoquant.console import table
from nanoquant.estimate.estimate import Estimate
from nanoquant.estimate.size import Size
from nanoquant.estimate.terms import Need
from nanoquant.methods import Size as LayerSize
from nanoquant.methods import entry_of, stored_bits
from nanoquant.units import amount

TERMS = 3
"""Terms of a phase that are printed."""


def report(found: Estimate) -> str:
    """Ranks or codebooks, sizes, memory, disk and time."""
    subject = found.subject
    parts = [
        f"{subject.name}: {subject.parameters:,} parameters, {amount(subject.file_bytes)} dense, "
        f"{len(subject.shapes)} linears of {len(subject.chosen)} blocks",
        kind_lines(found),
        *(size_lines(size) for size in found.sizes),
        memory_lines(found),
        disk_lines(found),
        time_lines(found),
    ]
    return "\n\n".join(parts)


def kinds(found: Estimate, size: Size) -> dict[str, dict[str, Any]]:
    """Shape, ranks or codebooks, and bits of the linears, by the last parts of their names."""
    groups: dict[str, list[tuple[int, int, LayerSize, int]]] = {}
    for name, own in size.given.items():
        shape = found.subject.shapes[name]
        groups.setdefault(kind_of(name), []).append((*shape, own, stored_bits(shape, own)))
    return {kind: summary(layers) for kind, layers in groups.items()}


def kind_lines(found: Estimate) -> str:
    """Ranks or codebooks by kind of linear, of one storage of the embedding."""
    rows = kinds(found, found.sizes[len(found.sizes) // 2])
    header = ["layer", *next(iter(rows.values()))]
    return table([[kind, *map(str, row.values())] for kind, row in rows.items()], header=header)


def size_lines(size: Size) -> str:
    """Bits and bytes of one storage of the embedding."""
    sizes, files = size.files.sizes, size.files
    certain = (
        "exact, headers included" if size.exact else "the rest is at equal bits; losses choose"
    )
    rows = [
        ["bits per weight, body", f"{sizes.body_bits_per_weight:.4f}"],
        ["bits per weight, whole model", f"{sizes.model_bits_per_parameter:.4f}"],
        [
            "bytes of weight files",
            f"{files.weight_bytes:,}" if size.exact else f"{size.least:,} to {size.most:,}",
        ],
        ["files", f"{len(files.files)}"],
        ["embedding and head", f"{size.config.embedding.bits} bits"],
    ]
    return f"{table(rows)}\n({certain})"


def memory_lines(found: Estimate) -> str:
    """Peaks of each phase, and of inference."""
    gpu = found.quantities.use.gpu
    rows = [_need(need, gpu) for need in found.needs]
    whose = " of each process" if found.devices > 1 else ""
    header = [f"memory{whose} at most", "main", *(["GPU"] if gpu else []), "largest terms"]
    lines = [table(rows, header=header)]
    use = found.inference
    if use is not None:
        total = use.weights + use.cache + use.activations
        place = "GPU" if gpu else f"main memory, with the process {amount(total + use.base)}"
        lines.append(
            f"inference, context {use.context}, batch {use.batch}: {amount(use.weights)} weights, {amount(use.cache)} "
            f"cache, {amount(use.activations)} activations: {amount(total)} {'on the ' if gpu else 'in '}{place}"
        )
    return "\n".join(lines)


def _need(need: Need, gpu: bool) -> list[str]:
    """A phase as a row."""
    terms = sorted(need.terms, key=lambda term: -term.bytes)[:TERMS]
    named = ", ".join(f"{amount(term.bytes)} {term.name}" for term in terms if term.bytes)
    sizes = [amount(need.bytes(device)) for device in ((False, True) if gpu else (False,))]
    return [need.phase, *sizes, named]


def disk_lines(found: Estimate) -> str:
    """What is needed on the disk."""
    parts = {
        "checkpoint": found.disk.checkpoint,
        "work that a killed run goes on with, at most": found.disk.unfinished,
        "activations": found.disk.activations,
    }
    listed = ", ".join(f"{amount(size)} {name}" for name, size in parts.items() if size)
    return f"disk: {amount(sum(parts.values()))}: {listed}"


def time_lines(found: Estimate) -> str:
    """Seconds of each phase as a range."""
    rows = [[name, _time(low), _time(high)] for name, (low, high) in found.seconds.items()]
    total = [sum(pair[k] for pair in found.seconds.values()) for k in (0, 1)]
    rows.append(["all", *map(_time, total)])
    several = (
        f" {found.devices} devices divide ranks, blocks and model." if found.devices > 1 else ""
    )
    return f"{table(rows, header=['time', 'from', 'to'])}\nRates {found.rates.source}.{several}"


def _time(seconds: float) -> str:
    """Seconds in a unit that is easy to read."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def to_dict(found: Estimate) -> dict[str, Any]:
    """Plain values by name."""
    gpu = found.quantities.use.gpu
    return {
        "format": 2,
        "model": found.subject.name,
        "parameters": found.subject.parameters,
        "dense_bytes": found.subject.file_bytes,
        "config": found.quantities.config.to_dict(),
        "sizes": [
            {
                "embedding_bits": size.config.embedding.bits,
                "exact": size.exact,
                "least_bytes": size.least,
                "most_bytes": size.most,
                "files": size.files.files,
                **size.files.sizes.to_dict(),
                "layers": {name: entry_of(own) for name, own in size.given.items()},
                "linears": kinds(found, size),
            }
            for size in found.sizes
        ],
        "memory": {
            need.phase: {
                "memory_bytes": need.bytes(),
                **({"gpu_memory_bytes": need.bytes(device=True)} if gpu else {}),
                "terms": [asdict(term) for term in need.terms],
            }
            for need in found.needs
        },
        "inference": None if found.inference is None else asdict(found.inference),
        "disk": asdict(found.disk),
        "seconds": found.seconds,
        "devices": found.devices,
        "rates": asdict(found.rates),
    }
