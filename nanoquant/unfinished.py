"""Unfinished work of :func:`quantize` in a folder: importances and layers block by block, the whole-model phase.

The same call with the same model, text, settings and version goes on there and ends with the same result; another one
is refused with the difference named. Every file is whole or absent, so a run can be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import nanoquant
from nanoquant.architectures import Decoder
from nanoquant.block_config import BlockReport
from nanoquant.checkpoint_files import read_header
from nanoquant.config import NanoQuantConfig
from nanoquant.digest import code_digest, model_digest
from nanoquant.importance import Importance
from nanoquant.importance_store import ImportanceStore
from nanoquant.mapped import forget, map_tensors
from nanoquant.methods import Size, Sizes, entry_of, size_of
from nanoquant.model_state import ModelState
from nanoquant.output_folder import check_can_be_made
from nanoquant.processes import on_first
from nanoquant.shared_blocks import layer_parts, put_layers
from nanoquant.tensor_file import TensorFile, forget_torn
from nanoquant.text import Text
from nanoquant.text_plan import TextPlan

logger = logging.getLogger(__name__)

PATTERN = "unfinished-*.safetensors"
LOGITS = "logits of the teacher"
MAPPED = ("U", "V", "u_signs", "v_signs", "indices", "indices2")
"""Parts of a layer that stay in its file; whoever trains latents gives them memory of their own."""
RUN = ("save_every", "accelerator", "activation_memory", "timeout", "offload")
IDLE = ("preset", "model.shard", "model.recompute", "self_text.batch", *(f"run.{n}" for n in RUN))
"""Fields that decide nothing of the result."""


@dataclass(frozen=True)
class Initialized:
    """What the phases before the whole-model one gave, besides the quantized layers themselves."""

    option: int
    """Which of the configs that the budget left was chosen."""
    sizes: Sizes
    blocks: dict[int, BlockReport]
    importances: Mapping[str, Importance]


class Unfinished:
    """Files of one run.

    Args:
        folder: there or to be made; None keeps nothing.
        model: dense.
        text: all windows.
        config: as asked.

    Raises:
        ValueError: nothing can be written to the folder. Later a disk that refuses a file ends the run: its checkpoint
            would lie on the same one, and what was kept until then is not lost.
    """

    def __init__(
        self, folder: str | Path | None, model: nn.Module, text: Text, config: NanoQuantConfig
    ) -> None:
        self.every = config.run.save_every or 0.0
        """Seconds between two copies of what is large and changes all the time."""
        kept = folder is not None and config.run.save_every is not None
        self.folder = Path(folder) if kept else None
        self.settings = {}
        if self.folder is not None:
            check_can_be_made(self.folder, f"unfinished work in {self.folder}")
            self.settings = _settings(model, config) | _text(text)
        self.importances = ImportanceStore(self._importance)
        self.gradient = self._file("gradient", "gradients of the calibration")
        state = self._file("model", "training of the model")
        if self.folder is not None and config.model.optimizer.state_bits != 32:
            logger.warning(
                "moments of %d bits are not kept on the disk: a killed run begins the whole-model phase anew",
                config.model.optimizer.state_bits,
            )
            state.path = None
        self.model = ModelState(state, self.every)

    def _file(self, name: str, what: str) -> TensorFile:
        path = None if self.folder is None else self.folder / PATTERN.replace("*", name)
        return TensorFile(path, self.settings, what)

    def _importance(self, b: int) -> TensorFile:
        return self._file(f"importance-{b:03}", f"importances of block {b}")

    def _block(self, b: int) -> TensorFile:
        return self._file(f"block-{b:03}", f"block {b}")

    def _logits(self) -> list[TensorFile]:
        """Files of :meth:`keep_logits` that are there."""
        paths = () if self.folder is None else self.folder.glob(PATTERN.replace("*", "logits-*"))
        return [TensorFile(path, self.settings, LOGITS) for path in sorted(paths)]

    def read(self, decoder: Decoder, chosen: range) -> Initialized | None:
        """Put kept layers into the dense model when all blocks have them; None where some do not.

        Raises:
            ValueError: what is kept belongs to another run.
        """
        files, refusals = {b: self._block(b) for b in chosen}, []
        calibration = (*(self.importances.file(b) for b in chosen), self.gradient)
        for file in (*calibration, *files.values(), self.model.file, *self._logits()):
            try:
                file.values()
            except ValueError as error:
                refusals.append(str(error))
        if refusals:
            more = f"; so do {len(refusals) - 1} other {PATTERN} files" if len(refusals) > 1 else ""
            raise ValueError(refusals[0] + more)
        if not all(files[b].values() and self.importances.has(b) for b in chosen):
            return None
        found = {b: self.take_block(decoder, b) for b in chosen}
        values = files[chosen[0]].values()
        sizes = {
            full: size_of(entry)
            for file in files.values()
            for full, entry in file.values()["sizes"].items()
        }
        return Initialized(values["option"], sizes, found, self.importances.diagonals(chosen))

    def calibrated(self, blocks: int, chosen: range) -> tuple[int, Tensor | None]:
        """The block from which on all have been calibrated, and the gradient (N, T, d) at its input.

        All ``blocks`` of a model, and no gradient, where none is; the first chosen one where nothing is left to do.
        Blocks before may have been calibrated since that gradient was kept; they are again, to the same result.
        """
        if all(self.importances.has(b) for b in chosen):
            return chosen.start, None
        begun = self.gradient.values().get("block", blocks)
        if all(self.importances.has(b) for b in chosen if b >= begun) and begun < blocks:
            return begun, self.gradient.read().tensors["gradient"]
        return blocks, None

    def keep_calibrated(
        self, b: int, chosen: range, importances: Mapping[str, Importance], gradient: Tensor
    ) -> None:
        """Keep a calibrated block's importances, if it is chosen, and now and then the gradient at its input.

        The gradient of a large model takes long to write; a killed run calibrates again from where it was written last.
        """
        if b in chosen and not self.importances.has(b):
            self.importances.keep(b, importances)
        if b == chosen.start:
            self.gradient.delete()
        elif self.gradient.age() >= self.every:
            self.gradient.write({"gradient": gradient}, {"block": b})
            forget([gradient])

    def take_block(
        self, decoder: Decoder, b: int, sizes: Mapping[str, Size] | None = None, option: int = 0
    ) -> BlockReport | None:
        """Put the kept layers of a block into the model; None where none are kept.

        Args:
            decoder: blocks of the dense model.
            b: which.
            sizes: those that are chosen now, which must be its own; None takes its own.
            option: what they belong to.

        Raises:
            ValueError: it was made with other sizes.
        """
        file = self._block(b)
        values = file.values()
        if not values:
            return None
        own = {full: size_of(entry) for full, entry in values["sizes"].items()}
        chosen = own if sizes is None else {full: sizes[full] for full in own}
        if sizes is not None and (chosen, option) != (own, values["option"]):
            raise ValueError(
                f"{file.path} was made with other ranks than losses give now, so they were measured elsewhere or lost: "
                f"put back the sensitivity file of that run, or delete the {PATTERN} files beside it"
            )
        put_layers(decoder, b, _stored(file))
        return BlockReport(**values["report"])

    def keep_block(
        self, decoder: Decoder, b: int, sizes: Mapping[str, Size], option: int, report: BlockReport
    ) -> None:
        """Keep the layers of a finished block, whose signs or indices live in the file from then on.

        Of several processes the first one keeps them, for all.
        """
        layers = {
            decoder.full_name(b, name): decoder.blocks[b].get_submodule(name)
            for name in decoder.linears[b]
        }
        tensors = {
            f"{full}.{part}": tensor
            for full, parts in layer_parts(decoder, b).items()
            for part, tensor in parts.items()
        }
        values = {"option": option, "sizes": {full: entry_of(sizes[full]) for full in layers}}
        file = self._block(b)
        on_first(lambda: file.write(tensors, values | {"report": asdict(report)}))
        if file.path is None:
            return
        for full, parts in _stored(file).items():
            if layers[full].vectors()[0].device.type == "cpu":
                mapped = {part: tensor for part, tensor in parts.items() if part in MAPPED}
                layers[full].load_state_dict(mapped, strict=False, assign=True)

    def keep_logits(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, from its file where there is one."""
        file = self._file(f"logits-{name}", LOGITS)
        if not on_first(file.values):
            tensors = make()
            file.write(tensors, {"tensors": len(tensors)})
            if file.path is None:
                return tensors
        on_first(lambda: None)  # when it is written
        return map_tensors(read_header(file.path)[0])


def discard(folder: str | Path) -> None:
    """Delete the unfinished work of a folder: its run has ended."""
    forget_torn(Path(folder))
    for path in Path(folder).glob(PATTERN):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s can't be deleted (%s); it is of no use any more", path, error)


def _stored(file: TensorFile) -> dict[str, dict[str, Tensor]]:
    """Parts of the layers of a block's file by full name; ``MAPPED`` ones are mapped, the rest is read."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in map_tensors(read_header(file.path)[0]).items():
        full, _, part = name.rpartition(".")
        layers.setdefault(full, {})[part] = tensor if part in MAPPED else tensor.clone()
    return layers


def check_settings(
    folder: str | Path, model: nn.Module, plan: TextPlan, config: NanoQuantConfig
) -> None:
    """Refuse a folder that keeps another run's work, before this one writes anything, text included.

    Raises:
        ValueError: names the difference.
    """
    settings = _settings(model, config) | {"text": plan.digest[:16]}
    for name in (
        ("gradient", "importance-*", "block-*", "logits-*", "model")
        if config.run.save_every is not None
        else ()
    ):
        for path in sorted(Path(folder).glob(PATTERN.replace("*", name, 1)))[:1]:
            TensorFile(path, settings, "unfinished work").values()


def _settings(model: nn.Module, config: NanoQuantConfig) -> dict[str, str]:
    """What decides a run besides its text, as text."""
    found = {
        "model weights": model_digest(model)[:16],
        "version": nanoquant.__version__,
        "nanoquant's source code": code_digest()[:16],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return found | {
        name: json.dumps(value) for name, value in _flat(config.to_dict()) if name not in IDLE
    }


def _text(text: Text) -> dict[str, str]:
    """What tells the text of a run, and the windows that it gave, from others."""
    tokens = hashlib.sha256()
    for windows in (text.calibration, text.training, text.held_out):
        tokens.update(f"{tuple(windows.shape)}".encode())
        tokens.update(windows.cpu().contiguous().numpy().tobytes())
    return {"text": text.digest[:16], "windows": tokens.hexdigest()[:16]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of nested stages by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
