"""Baselines one after the other on fresh copies of the dense weights; what is finished is not computed again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoquant.baselines.config import BaselineConfig
from nanoquant.baselines.registry import BASELINES, apply_baseline, check_shapes, find_baseline
from nanoquant.baselines.target import Target, linear_shapes
from nanoquant.console import ConsoleProgress, note
from nanoquant.evaluation.compare import read_record
from nanoquant.evaluation.protocols import Prepared
from nanoquant.evaluation.record import evaluate_model, make_record, phase_names
from nanoquant.evaluation.request import EvaluationRequest
from nanoquant.json_files import write_json

ALL = "all"


def chosen_names(text: str, config: BaselineConfig) -> list[str]:
    """Names in a list with commas; "all" means those that run here with what is given.

    Raises:
        ValueError: as :func:`find_baseline`, for each name and before any work.
    """
    if text == ALL:
        return [
            name
            for name, baseline in BASELINES.items()
            if baseline.apply and (config.text or not baseline.needs_text)
        ]
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ValueError(f"give at least one baseline, or {ALL}: {', '.join(BASELINES)}")
    for name in names:
        find_baseline(name, config)
    return names


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """What every baseline of a run is measured on."""

    name: str
    """Of the dense model, as the user gave it."""
    tokenizer: PreTrainedTokenizerBase
    request: EvaluationRequest
    windows: Sequence[Prepared]
    """Of the request."""


class BaselineRuns:
    """Runs baselines of one dense model and keeps a record of each in a folder.

    Args:
        dense: the model; it stays as it is.
        measurement: what is measured.
        config: settings of the baselines.
        calibration: token ids (N, T) of the calibration text; none without text.
        folder: where records are kept as NAME.json; none keeps nothing.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        measurement: Measurement,
        config: BaselineConfig,
        calibration: Tensor | None = None,
        folder: str | None = None,
    ) -> None:
        self.dense, self.measurement, self.config = dense, measurement, config
        self.calibration, self.folder = calibration, None if folder is None else Path(folder)

    def __call__(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Records of the baselines, in the order of their names.

        Raises:
            ValueError: the folder has a record of another run, or a baseline does not fit the model.
        """
        shapes = linear_shapes(self.dense)
        for name in names:  # all are checked before any work
            check_shapes(name, shapes, self.config)
        finished = {name: self.finished(name) for name in names}
        records: list[dict[str, Any]] = []
        for number, name in enumerate(names, 1):
            state = "finished before" if finished[name] else "runs"
            note(f"baseline {number} of {len(names)}: {name} {state}")
            beside = records[-1]["dense"] if records else None
            records.append(finished[name] or self.run(name, beside))
        return records

    def finished(self, name: str) -> dict[str, Any] | None:
        """The record that an earlier run left.

        Raises:
            ValueError: it is of another model, measurement or setting; names what differs.
        """
        file = self.file(name)
        if file is None or not file.exists():
            return None
        record, wanted = read_record(str(file)), self.identity(name)
        found = record.get("baseline") or {}
        apart = sorted(key for key in wanted if found.get(key) != wanted[key])
        if apart:
            raise ValueError(
                f"{file} is the record of another run ({', '.join(apart)} differ); give another --out, or delete it"
            )
        return record

    def run(self, name: str, beside: dict[str, Any] | None = None) -> dict[str, Any]:
        """Quantize a copy, measure it, and keep the record.

        Args:
            name: of the baseline.
            beside: figures of the dense model from an earlier record of this run.
        """
        what = self.measurement
        progress = ConsoleProgress(["quantize", *phase_names(what.request, dense=True)])
        target = Target.of(copy.deepcopy(self.dense), progress)
        with progress.phase("quantize", len(target.shapes)), torch.no_grad():
            apply_baseline(name, target, self.config, self.calibration)
        measured = evaluate_model(
            target.model,
            what.tokenizer,
            what.request,
            self.dense,
            beside,
            progress,
            what.windows,
        )
        sizes = target.sizes()
        record = make_record(
            measured,
            target.model,
            what.tokenizer,
            name=what.name,
            method=name,
            file_bytes=sizes.bytes_on_disk,  # nothing is written: the tensors without headers
            seed=what.request.seed,
            seconds=progress.seconds,
            dense_name=what.name,
        )
        record |= {"bits": sizes.to_dict(), "baseline": self.identity(name)}
        if (file := self.file(name)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(str(file), record)
        return record

    def file(self, name: str) -> Path | None:
        """Where the record of a baseline is kept."""
        return None if self.folder is None else self.folder / f"{name}.json"

    def identity(self, name: str) -> dict[str, Any]:
        """What a record must agree in to be the one of this run; plain values."""
        baseline, config = find_baseline(name, self.config)
        return {
            "model": self.measurement.name,
            "name": name,
            "settings": {key: getattr(config, key) for key in baseline.reads},
            "request": asdict(self.measurement.request),
        }
