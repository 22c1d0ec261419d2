"""What a finished checkpoint has to pass, in a process that knows nothing but its folder.

Checks are made where their facts are at hand anyway, one after the other; the first that fails ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nanoquant.architectures import decoder_from_structure
from nanoquant.checkpoint_files import read_json, verify_folder
from nanoquant.config import NanoQuantConfig
from nanoquant.evaluation.perplexity import window_logits
from nanoquant.generate import Generation, continue_greedily
from nanoquant.hf_quantizer import shorten
from nanoquant.non_finite import non_finite
from nanoquant.packed_layers import packed_modules
from nanoquant.sources import load_model

PROMPT, TOKENS = "The", 8
"""What is continued, and by how much, where no sample is asked for."""


@dataclass
class Check:
    """One check: what was looked at, how it ended, and what was found."""

    name: str
    ok: bool
    found: str


class Verification:
    """Checks in the order in which they are made; each raises what it finds wrong, after it is noted.

    Args:
        checks: of :meth:`to_list`, as another process made them.
    """

    def __init__(self, checks: list[dict[str, Any]] | None = None) -> None:
        self.checks = [Check(**check) for check in checks or []]
        self.vocabulary = 0

    @property
    def ok(self) -> bool:
        """Whether all were passed."""
        return all(check.ok for check in self.checks)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, for JSON."""
        return [asdict(check) for check in self.checks]

    def line(self) -> str:
        """All of it in one line."""
        if not self.checks:
            return "NOT verified: that was not reached"
        wrong = [f"{check.name}: {check.found}" for check in self.checks if not check.ok]
        if wrong:
            return f"NOT verified: {'; '.join(wrong)}"
        return f"verified: {', '.join(check.found for check in self.checks)}"

    def fail(self, name: str, error: BaseException) -> None:
        """Note what is wrong, unless it is noted already."""
        if self.ok:
            self.checks.append(
                Check(name, False, " ".join(str(error).split()) or type(error).__name__)
            )

    def load(self, folder: Path, device: torch.device) -> PreTrainedModel:
        """The model of a checkpoint; its files, all of its tensors, and what of it is packed.

        Raises:
            ValueError: something is wrong.
        """
        stored = self._check("load", verify_folder, folder)
        model = self._check("load", load_model, folder, device)
        self._pass("load", f"{len(stored)} tensors loaded")
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self._pass("finite", self._check("finite", check_finite, model))
        self._pass("coverage", self._check("coverage", check_coverage, folder, model))
        return model

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | None,
        tokens: int,
    ) -> str | None:
        """The continuation of a prompt; None where none is given, and a short one is continued.

        Raises:
            ValueError: it ends at once, or logits are not finite.
        """
        asked = (PROMPT, TOKENS) if prompt is None else (prompt, tokens)
        done = self._check("generation", continue_greedily, model, tokenizer, *asked)
        arguments = (model, tokenizer, asked[0], done)
        self._pass("generation", self._check("generation", check_generation, *arguments))
        return None if prompt is None else done.texts[0]

    def guard(self, perplexity: float | None, most: float | None) -> None:
        """Hold a perplexity, if one was measured, against the largest that passes; None is that of guessing evenly.

        Raises:
            ValueError: it is above, or no number.
        """
        if perplexity is not None:
            most = float(self.vocabulary) if most is None else most
            found = self._check("perplexity", check_perplexity, perplexity, most)
            self._pass("perplexity", found)

    def _pass(self, name: str, found: str) -> None:
        self.checks.append(Check(name, True, found))

    def _check(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        """What a function gives; what it raises is noted."""
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            self.fail(name, error)
            raise


def check_finite(model: nn.Module) -> str:
    """Every tensor of a loaded model, buffers included.

    Raises:
        ValueError: names those that have a value that is not finite, and packed ones of zeros alone, as a disk that
            lost what was written leaves them.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    broken = non_finite(tensors)
    if broken:
        raise ValueError(f"values that are not finite in {shorten(broken)}")
    empty = [
        f"{name}.{part}"
        for name, layer in packed_modules(model).items()
        for part, tensor in layer.named_parameters()
        if tensor.is_floating_point() and part != "bias" and not tensor.any()
    ]
    if empty:
        raise ValueError(f"nothing but zeros in {shorten(empty)}; copy the checkpoint again")
    return f"{len(tensors)} tensors finite"


def check_coverage(folder: Path, model: PreTrainedModel) -> str:
    """The linears of the blocks that the recipe chose, and no other in any block, are packed.

    Args:
        folder: of the checkpoint, whose recipe says which blocks were chosen.
        model: loaded from there.

    Raises:
        ValueError: names linears that are dense though they were chosen, or the other way round.
    """
    recipe = read_json(folder / "config.json")["quantization_config"].get("recipe") or {}
    packed = packed_modules(model).keys()
    if "config" not in recipe:
        return f"{len(packed)} linears packed"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    decoder = decoder_from_structure(dense)
    chosen = NanoQuantConfig(blocks=recipe["config"].get("blocks"))
    blocks = chosen.block_range(len(decoder.blocks))
    wanted = {decoder.full_name(b, name) for b in blocks for name in decoder.linears[b]}
    found = {name for name in packed if name.startswith(f"{decoder.path}.")}
    if left := sorted(wanted - found):
        raise ValueError(
            f"{len(left)} linears of the chosen blocks are dense: {shorten(left)}; the checkpoint is not what its "
            "recipe says"
        )
    if more := sorted(found - wanted):
        raise ValueError(
            f"{len(more)} linears of blocks that were not chosen are packed: {shorten(more)}"
        )
    return f"all {len(wanted)} linears of {len(blocks)} blocks packed"


def check_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    done: Generation,
) -> str:
    """A greedy continuation: it is there, and logits over it are finite.

    Raises:
        ValueError: it ends at once, or logits are not finite.
    """
    count, text = done.new_tokens[0], done.texts[0]
    ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
    if not window_logits(model, ids).isfinite().all():
        raise ValueError("the logits of a generated text are not finite")
    if count < 2 and not text:
        raise ValueError(f"the model ends {prompt!r} at once, with no text")
    return f"{count} tokens generated"


def check_perplexity(value: float, most: float) -> str:
    """The perplexity against its guard.

    Raises:
        ValueError: it is above, or no number.
    """
    if not (math.isfinite(value) and value <= most):
        raise ValueError(f"perplexity is {value:.6g}, and at most {most:.6g} passes")
    return f"perplexity {value:.6g}" + (f" of at most {most:.6g}" if most < math.inf else "")
