"""The plan of an ablation: a YAML of flags that all cells share, and of axes whose choices make the cells.

Such as::

    base:                        # flags of "nanoquant quantize", by dotted name
      preset: paper
      text: recipes/data/wiki_train.txt
      eval_text: recipes/data/wiki_test.txt
    mode: grid                   # every combination; "each" changes one axis at a time, first choices elsewhere
    axes:
      budget.bits: [1.0, 0.8]    # a flag and its values
      phases:                    # or any name, and several flags for each choice
        initialization: {block.dense_epochs: 0, block.refine_epochs: 0, model.train: none}
        all: {}
      run.seed: [0, 1]           # seeds become one row, with their spread
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoquant.config import NanoQuantConfig
from nanoquant.job_config import JobConfig
from nanoquant.json_files import flag_text
from nanoquant.parsers import parse_quantize
from nanoquant.yaml_files import read_yaml

MODES = ("grid", "each")
SEED = "run.seed"
MIXTURE = "text"
"""The flag that may be a list of values at once."""
NOT_OURS = ("source", "output", "json", "logger", "sample")
"""Flags of a job that a cell has no use for."""


@dataclass(frozen=True)
class Cell:
    """One quantization: its choice on every axis, and the flags that follow."""

    choices: dict[str, str]
    flags: dict[str, Any]
    job: JobConfig = field(compare=False)
    config: NanoQuantConfig = field(compare=False)

    @property
    def key(self) -> str:
        """Name of its record: choices for the reader, and a hash over all that decides the outcome."""
        job = {name: value for name, value in vars(self.job).items() if name not in NOT_OURS}
        decides = [str(Path(self.job.source).absolute()), job, self.config.to_dict()]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        words = "-".join(
            f"{axis.rpartition('.')[2]}-{label}" for axis, label in self.choices.items()
        )
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:80]}-{digest}"


@dataclass(frozen=True)
class Plan:
    """Cells in order, and the axes by name with their labels."""

    cells: list[Cell]
    axes: dict[str, list[str]]


def read_plan(file: str | Path, model: str, changes: dict[str, Any] | None = None) -> Plan:
    """Cells of a YAML file for one model, every one of them checked as the command checks its flags.

    Args:
        file: see the module.
        model: folder or Hub name of the dense model.
        changes: flags that replace those of the base.

    Raises:
        ValueError: the file is no such plan, or a cell's flags are not usable; names the cell.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not isinstance(content.get("axes"), dict):
        raise ValueError(f"{file} has no axes; give a mapping of flags to lists of values")
    unknown = sorted(map(str, content.keys() - {"base", "mode", "axes"}))
    mode = content.get("mode", MODES[0])
    if unknown or mode not in MODES:
        wrong = f"unknown keys {', '.join(unknown)}" if unknown else f"mode {mode!r}"
        raise ValueError(f"{file}: {wrong}; it takes base, axes and mode, {' or '.join(MODES)}")
    if not isinstance(content.get("base") or {}, dict):
        raise ValueError(f"{file}: base is no mapping of flags")
    base = (content.get("base") or {}) | (changes or {})
    axes = {name: _choices(file, name, given) for name, given in content["axes"].items()}
    cells = [_cell(model, base, axes, labels) for labels in _combinations(axes, mode)]
    return Plan(cells, {name: list(choices) for name, choices in axes.items()})


def _choices(file: str | Path, name: str, given: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401
    """Label to flags of one axis."""
    if isinstance(given, list) and given:
        return {flag_text(value): {name: value} for value in given}
    if isinstance(given, dict) and given and all(isinstance(v, dict) for v in given.values()):
        return {str(label): flags for label, flags in given.items()}
    raise ValueError(
        f"{file}: axis {name} needs a list of values, or a mapping of names to flags, got {given!r}"
    )


def _combinations(axes: dict[str, dict[str, Any]], mode: str) -> list[dict[str, str]]:
    """Labels by axis of every cell; seeds are combined with all others in either mode."""
    every = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())]
    if mode == "grid":
        return every
    first = {name: next(iter(choices)) for name, choices in axes.items() if name != SEED}
    return [labels for labels in every if sum(labels[name] != first[name] for name in first) <= 1]


def _cell(
    model: str, base: dict[str, Any], axes: dict[str, dict[str, Any]], labels: dict[str, str]
) -> Cell:
    flags = dict(base)
    for name, label in labels.items():
        flags |= axes[name][label]
    unused = [name for name in NOT_OURS if name in flags]
    try:
        if unused:
            raise ValueError(f"{', '.join(unused)} has no use here")
        written = [
            f"--{name}={flag_text(item)}"
            for name, value in flags.items()
            for item in (value if name == MIXTURE and isinstance(value, list) else [value])
        ]
        job, config = parse_quantize([model, "-", *written])
        if job.eval_text is None:
            raise ValueError("an ablation needs eval_text, a held-out text")
    except ValueError as error:
        where = ", ".join(f"{name} {label}" for name, label in labels.items())
        raise ValueError(f"the cell {where}: {error}") from error
    return Cell(labels, flags, job, config)
