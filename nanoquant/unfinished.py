"""Unfinished work of :func:`quantize` in a folder: blocks once they are binary, then the whole-model phase.

The same call with the same model, text, settings and version goes on there and ends with the same result; another one
is refused with the difference named.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nanoquant
from nanoquant.architectures import Decoder, linear_shape
from nanoquant.block_reconstruction import BlockReport
from nanoquant.config import NanoQuantConfig
from nanoquant.digest import model_digest
from nanoquant.importance import Importance
from nanoquant.linear import BinaryLowRankLinear
from nanoquant.model_state import ModelState
from nanoquant.tensor_file import TensorFile
from nanoquant.text import Text

logger = logging.getLogger(__name__)

PATTERN = "unfinished-*.safetensors"
PARTS = ("U", "V", "s1", "s2", "bias")
IDLE = ("preset", "run.save_every", "run.accelerator")
"""Fields that decide nothing of the result."""


@dataclass(frozen=True)
class Initialized:
    """What the phases before the whole-model one gave, besides the binary layers themselves."""

    option: int
    """Which of the configs that the budget left was chosen."""
    ranks: dict[str, int]
    blocks: dict[int, BlockReport]
    importances: Mapping[str, Importance]


class Unfinished:
    """Files of one run.

    Args:
        folder: there or to be made; None keeps nothing.
        model: dense.
        text: all windows.
        config: as asked.
    """

    def __init__(
        self, folder: str | Path | None, model: nn.Module, text: Text, config: NanoQuantConfig
    ) -> None:
        every = config.run.save_every
        keeps = folder is not None and every is not None and config.model.train != "none"
        settings = _settings(model, text, config) if keeps else {}
        self.blocks, state = (
            TensorFile(Path(folder) / PATTERN.replace("*", name) if keeps else None, settings, what)
            for name, what in (("blocks", "binary blocks"), ("model", "training of the model"))
        )
        if keeps and config.model.optimizer.state_bits != 32:
            logger.warning(
                "moments of %d bits are not kept on the disk: a killed run begins the whole-model phase anew",
                config.model.optimizer.state_bits,
            )
            state.path = None
        self.model = ModelState(state, every or 0.0)

    def read(self, decoder: Decoder) -> Initialized | None:
        """Put kept binary layers into the dense model; None where none are kept.

        Raises:
            ValueError: they belong to another run.
        """
        refusals = []
        for file in (self.blocks, self.model.file):
            try:
                file.values()
            except ValueError as error:
                refusals.append(str(error))
        if refusals:
            raise ValueError("; ".join(refusals))
        content = self.blocks.read()
        if content is None:
            return None
        tensors, values = content
        for b, block in enumerate(decoder.blocks):
            for name in decoder.linears[b]:
                full = decoder.full_name(b, name)
                if full in values["ranks"]:
                    parts = {p: tensors[f"{full}.{p}"] for p in PARTS if f"{full}.{p}" in tensors}
                    block.set_submodule(name, _layer(block.get_submodule(name), parts))
        importances = {
            full: Importance(tensors[f"{full}.input"], tensors[f"{full}.output"], scale)
            for full, scale in values["scales"].items()
        }
        blocks = {int(b): BlockReport(**report) for b, report in values["blocks"].items()}
        return Initialized(values["option"], values["ranks"], blocks, importances)

    def write(self, model: nn.Module, found: Initialized) -> None:
        """Keep binary layers and what belongs to them."""
        tensors = {}
        for full in found.ranks:
            layer = model.get_submodule(full)
            parts = {name: getattr(layer, name) for name in PARTS}
            tensors |= {f"{full}.{name}": t for name, t in parts.items() if t is not None}
        for full, importance in found.importances.items():
            tensors |= {f"{full}.input": importance.input, f"{full}.output": importance.output}
        values = {
            "option": found.option,
            "ranks": found.ranks,
            "blocks": {b: asdict(report) for b, report in found.blocks.items()},
            "scales": {full: importance.scale for full, importance in found.importances.items()},
        }
        self.blocks.write(tensors, values)


def discard(folder: str | Path) -> None:
    """Delete the unfinished work of a folder: its run has ended."""
    for path in (*Path(folder).glob(PATTERN), *Path(folder).glob(f"{PATTERN}.partial")):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s can't be deleted (%s); it is of no use any more", path, error)


@torch.no_grad()
def _layer(dense: nn.Module, parts: Mapping[str, Tensor]) -> BinaryLowRankLinear:
    """The binary layer of kept parts, in the place of a dense linear or Conv1D."""
    d_out, d_in = linear_shape(dense)
    rank, device = parts["U"].shape[1], dense.weight.device
    layer = BinaryLowRankLinear(d_in, d_out, rank, "bias" in parts, device)
    if not parts["U"].is_floating_point():
        layer.freeze()
    for name, tensor in parts.items():
        getattr(layer, name).copy_(tensor)
    return layer


def _settings(model: nn.Module, text: Text, config: NanoQuantConfig) -> dict[str, str]:
    """What decides a run, as text."""
    tokens = hashlib.sha256()
    for windows in (text.calibration, text.training, text.held_out):
        tokens.update(f"{tuple(windows.shape)}".encode())
        tokens.update(windows.cpu().contiguous().numpy().tobytes())
    found = {"model weights": model_digest(model)[:16], "text": tokens.hexdigest()[:16]}
    fields = {
        name: json.dumps(value) for name, value in _flat(config.to_dict()) if name not in IDLE
    }
    return found | {"version": nanoquant.__version__} | fields


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of nested stages by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
