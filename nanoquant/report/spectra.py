"""Section on singular spectra: what a rank can hold of real weights, read from the dense source."""

from __future__ import annotations

import logging
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from nanoquant.budget import real_rank
from nanoquant.checkpoint_files import read_header, shard_files
from nanoquant.report.content import Plot, Section, Table, short
from nanoquant.report.measures import Cell, cell_of, layer_errors, layer_ranks
from nanoquant.report.run_files import Run
from nanoquant.report.style import MARKERS, Theme, log_axis, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BITS = (0.55, 0.8, 1.0)
"""Bits per weight whose ranks are marked."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one weight, largest first."""

    cell: Cell
    shape: tuple[int, int]
    values: list[float]

    @property
    def name(self) -> str:
        """Block and name within it."""
        return f"block {self.cell[0]}, {short(self.cell[1], 28)}"

    @property
    def energy(self) -> list[float]:
        """Share of the squared norm that the first 1, 2, ... singular values hold."""
        squares = torch.tensor(self.values, dtype=torch.float64).square()
        return (squares.cumsum(0) / squares.sum().clamp_min(1e-300)).tolist()

    def rank(self, bits: float) -> int:
        """Rank of binary factors that take so many bits per weight, at least 1, at most full."""
        return min(max(1, int(real_rank(*self.shape, bits))), len(self.values))


def spectrum_section(run: Run, count: int) -> Section:
    """Singular values of ``count`` layers of the dense source."""
    section = Section("spectra", "Singular spectra of the dense weights")
    if not count:
        section.missing.append("No spectra: --spectra 0 leaves them out.")
        return section
    try:
        spectra = layer_spectra(run, count)
    except ValueError as error:
        section.missing.append(f"No spectra: {error}.")
        return section
    section.items += [_plot(spectra), _table(spectra)]
    return section


def layer_spectra(run: Run, count: int) -> list[Spectrum]:
    """Spectra of some layers.

    Raises:
        ValueError: the source is not here, or none of the layers of the run is in it.
    """
    folder = source_folder(run)
    stored = {}
    for file in shard_files(folder):
        for name, tensor in read_header(file)[0].items():
            if name.endswith(".weight") and len(tensor.shape) == 2:
                stored[cell_of(name.removesuffix(".weight"))] = (file, name)
    stored.pop(None, None)
    wanted = [cell for cell in chosen_layers(run, count) if cell in stored]
    if not wanted:
        raise ValueError(
            f"none of the layers that the run names is a matrix in {folder}; it is another model"
        )
    spectra = []
    for cell in wanted:
        file, name = stored[cell]
        logger.info("singular values of %s", name)
        with safe_open(file, framework="pt") as tensors:
            weight = tensors.get_tensor(name).float()
        if not weight.isfinite().all():
            raise ValueError(f"{name} of {folder} has values that are not finite")
        values = torch.linalg.svdvals(weight).tolist()
        spectra.append(Spectrum(cell, tuple(weight.shape), values))
    return spectra


def source_folder(run: Run) -> Path:
    """The folder of the dense model, from where it was named or beside the run; nothing is fetched.

    Raises:
        ValueError: it is not on this machine.
    """
    source = run.text("source")
    if not source:
        raise ValueError("run.json does not name the dense model")
    for path in (Path(source), run.folder.parent / source):
        if os.path.isdir(path):  # False as well for names that no system takes
            return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError):
            pass
    raise ValueError(
        f"the dense model {short(source, 200)!r} is not on this machine; run nanoquant report where it is"
    )


def chosen_layers(run: Run, count: int) -> list[Cell]:
    """Layers of the first, middle and last block: the kinds with the largest and smallest error, then others."""
    errors = next(iter(layer_errors(run).values()), None)
    grid = errors or layer_ranks(run)
    if not grid.values:
        raise ValueError("the run names no layers")
    kinds = grid.kinds
    if errors:
        kinds = sorted(kinds, key=lambda kind: -statistics.fmean(errors.of_kind(kind)))
    kinds = [
        kinds[place // 2 if place % 2 == 0 else -1 - place // 2] for place in range(len(kinds))
    ]
    blocks = grid.blocks
    blocks = list(dict.fromkeys([blocks[0], blocks[len(blocks) // 2], blocks[-1]]))
    cells = [(block, kind) for kind in kinds for block in blocks if (block, kind) in grid.values]
    return cells[:count]


def _plot(spectra: list[Spectrum]) -> Plot:
    """Singular values, and the energy they hold with markers at the ranks of some bits."""

    def draw(canvas: Figure, theme: Theme) -> None:
        left, right = canvas.subplots(1, 2)
        styles = ("-", "--", ":")
        kinds = list(dict.fromkeys(spectrum.cell[1] for spectrum in spectra))
        blocks = list(dict.fromkeys(spectrum.cell[0] for spectrum in spectra))
        for spectrum in spectra:
            color = theme.lines[kinds.index(spectrum.cell[1]) % len(theme.lines)]
            style = {"color": color, "linestyle": styles[blocks.index(spectrum.cell[0]) % 3]}
            full = len(spectrum.values)
            shares = [100 * (place + 1) / full for place in range(full)]
            top = spectrum.values[0] or 1.0
            left.plot(shares, [max(v / top, 1e-9) for v in spectrum.values], **style)
            energy = [100 * share for share in spectrum.energy]
            right.plot(shares, energy, label=spectrum.name, **style)
            for bits, marker in zip(BITS, MARKERS, strict=False):
                rank = spectrum.rank(bits)
                place = shares[rank - 1], energy[rank - 1]
                right.plot(*place, marker, color=color, markeredgecolor=theme.paper, markersize=7)
        for bits, marker in zip(BITS, MARKERS, strict=False):
            right.plot([], [], marker, color=theme.ink, label=f"rank at {bits:g} bit")
        left.set(ylabel="singular value / largest", xlabel="index, % of full rank")
        least = min(spectrum.values[-1] / (spectrum.values[0] or 1.0) for spectrum in spectra)
        log_axis(left, max(1e-4, least / 1.2), 1.2)
        right.set(ylabel="cumulated energy, %", xlabel="rank, % of full rank", ylim=(0, 102))
        canvas.legend(loc="outside lower center", ncols=3)

    lows = [min(s.energy[s.rank(bits) - 1] for s in spectra) for bits in BITS]
    said = ", ".join(
        f"{100 * low:.0f} % at {bits:g} bit" for low, bits in zip(lows, BITS, strict=True)
    )
    caption = (
        "Left: singular values of some dense weights. Right: the share of the squared norm that the best matrix of "
        "each rank holds, marked at the ranks that binary factors have at 0.55, 0.8 and 1.0 bit. No factors of that "
        "rank, binary or not, hold more: the gap above a marker is the price of the rank, and signs cost more on top. "
        f"The flattest of these layers holds {said}."
    )
    return plot(
        "spectra", 4.6, draw, caption, f"Singular spectra of {len(spectra)} layers: {said}."
    )


def _table(spectra: list[Spectrum]) -> Table:
    """Ranks and energies at each number of bits."""
    header = ["layer", "out x in", *(f"{bits:g} bit: rank, energy" for bits in BITS)]
    rows = []
    for spectrum in spectra:
        pairs = [(spectrum.rank(bits), spectrum.energy) for bits in BITS]
        cells = [f"{rank}, {100 * energy[rank - 1]:.1f} %" for rank, energy in pairs]
        rows.append([spectrum.name, "{} x {}".format(*spectrum.shape), *cells])
    return Table(
        "Unweighted energy; errors above are weighted by importance, so they can be smaller than what is missing here.",
        header,
        rows,
    )
