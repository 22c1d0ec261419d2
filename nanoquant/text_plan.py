"""How many windows of text each phase asks for, and which source gives them; refused before a model does any work.

Shapes: N windows of T tokens, n tokens of a source.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nanoquant.config import NanoQuantConfig
from nanoquant.data import bos_of
from nanoquant.mixture import SELF, Data, Source, apportion, read_sources
from nanoquant.self_text import SelfTextConfig


@dataclass(frozen=True)
class Needs:
    """Windows that the phases ask of the text."""

    calibration: int
    blocks: int
    model: int
    held_out: int

    @classmethod
    def of(cls, config: NanoQuantConfig) -> Needs:
        """What a configuration asks for; phases that it leaves out ask for none."""
        model, trains = config.model, config.model.train != "none"
        return cls(
            calibration=config.calibration.windows,
            blocks=config.block.windows if config.block.tunes else 0,
            model=model.windows if trains else 0,
            held_out=model.held_out if trains else 0,
        )

    @property
    def kept(self) -> int:
        """Windows that are not held out; the phases share them."""
        return max(self.calibration, self.blocks, self.model)

    def above(self, most: int) -> str:
        """The settings that ask for more windows than ``most``."""
        names = ("calibration", "block", "model")
        asked = zip(names, (self.calibration, self.blocks, self.model), strict=True)
        return " and ".join(f"{name}.windows={count}" for name, count in asked if count > most)


@dataclass(frozen=True)
class TextPlan:
    """How many windows each source gives."""

    sources: list[Source]
    config: NanoQuantConfig
    bos: int | None
    """Token in front of every window."""
    kept: list[int]
    """Windows of each source for calibration, blocks and model."""
    held_out: list[int]
    """Windows of each source that choose the best state."""

    @property
    def own(self) -> int:
        """Tokens of the text in a window."""
        return _own(self.config, self.bos)

    @property
    def largest(self) -> int:
        """Largest token id of the texts; -1 where the model writes all."""
        return max((int(s.tokens.max()) for s in self.sources if s.tokens is not None), default=-1)

    @property
    def digest(self) -> str:
        """Digest of all texts, before the model writes any."""
        found = hashlib.sha256(f"{self.bos}".encode())
        for source in self.sources:
            own = SELF.encode() if source.tokens is None else source.tokens.cpu().numpy().tobytes()
            found.update(f" {source.weight} {len(own)} ".encode() + own)
        return found.hexdigest()

    @property
    def written(self) -> int:
        """Windows that the model has to write."""
        pairs = zip(self.sources, self.kept, self.held_out, strict=True)
        return self.config.self_text.windows + sum(k + h for s, k, h in pairs if s.tokens is None)


def plan_text(
    data: Data | TextPlan, tokenizer: PreTrainedTokenizerBase | None, config: NanoQuantConfig
) -> TextPlan:
    """Read the sources and share out the windows.

    Args:
        data: as in :func:`read_sources`, or a plan, whose sources are shared out for this configuration.
        tokenizer: needed for text.
        config: how many windows of which length.

    Raises:
        ValueError: a source can't be read or has fewer windows than its share, which setting asks for them.
    """
    bos = None if tokenizer is None else bos_of(tokenizer)
    needs, own = Needs.of(config), _own(config, bos)
    if isinstance(data, TextPlan):
        sources = data.sources
    else:
        sources = read_sources(data, tokenizer, (needs.kept + needs.held_out) * own)
    _check_added(sources, config, own)
    _check_unused(sources, config.self_text)
    holds = [None if s.tokens is None else len(s.tokens) // own for s in sources]
    if None not in holds:
        _check_all(sources, sum(holds), needs, config, own)
    empty = [s.name for s, hold in zip(sources, holds, strict=True) if hold == 0]
    if empty:
        raise ValueError(
            f"{', '.join(empty)} has not one window of {config.calibration.length} tokens; give it more text, or "
            "leave it out"
        )
    sizes = [1 if hold is None else hold for hold in holds]
    weights = [s.weight or size for s, size in zip(sources, sizes, strict=True)]
    shares = apportion(needs.kept + needs.held_out, weights)
    for source, hold, share in zip(sources, holds, shares, strict=True):
        if hold is not None and hold < share:
            raise ValueError(
                f"{source.name} has {hold} windows of {config.calibration.length} tokens, but its weight "
                f"{source.weight:g} of {sum(weights):g} asks for {share} of {sum(shares)} windows; give it a "
                f"lower weight or more text, or lower {needs.above(needs.kept - 1)}"
            )
    held_out = apportion(needs.held_out, shares)
    kept = [share - held for share, held in zip(shares, held_out, strict=True)]
    if 0 in kept:
        raise ValueError(
            f"the share of {sources[kept.index(0)].name} in {needs.kept} windows is none; give it more weight, "
            "or leave it out"
        )
    return TextPlan(sources, config, bos, kept, held_out)


def _own(config: NanoQuantConfig, bos: int | None) -> int:
    return config.calibration.length - (bos is not None)


def _check_all(
    sources: list[Source], available: int, needs: Needs, config: NanoQuantConfig, own: int
) -> None:
    """Refuse texts that together hold too little."""
    needed = needs.kept + needs.held_out
    if available >= needed:
        return
    tokens = sum(len(source.tokens) for source in sources)
    left = available - needs.held_out
    advice = "give longer text or fewer windows"
    if left >= max(1, needs.calibration, needs.blocks):  # only model.windows asks too much
        missing = config.self_text.windows + needs.model - left
        advice += f", or let the model write the rest: model.windows={left} and self_text.windows={missing}"
    elif not config.self_text.windows:
        advice += f', or let the model write all: text "{SELF}"'
    raise ValueError(
        f"the text has {tokens} tokens, enough for {available} windows of {config.calibration.length}; needed "
        f"are {needed * own}: {needs.kept} windows for {needs.above(left)}, and "
        f"model.held_out={needs.held_out}; {advice}"
    )


def _check_added(sources: list[Source], config: NanoQuantConfig, own: int) -> None:
    """Refuse windows of the model's own hand that have nothing to go on from."""
    if not config.self_text.windows:
        return
    if config.model.train == "none":
        raise ValueError(
            f"self_text.windows={config.self_text.windows} are for the model's reconstruction, but "
            "model.train=none leaves it out; ask for none"
        )
    if any(source.tokens is None for source in sources):
        raise ValueError(
            f'self_text.windows={config.self_text.windows} go on from a text, and text "{SELF}" has none; '
            "ask for more model.windows instead"
        )
    if config.self_text.prompt >= own:
        raise ValueError(
            f"self_text.prompt={config.self_text.prompt} leaves nothing to write in windows of {own} tokens; "
            f"allowed: up to {own - 1}"
        )


def _check_unused(sources: list[Source], config: SelfTextConfig) -> None:
    """Refuse settings of written text that change nothing."""
    alone = any(source.tokens is None for source in sources)
    unused, why = ("prompt", "temperature", "first"), "the model writes nothing"
    if alone:
        unused, why = ("prompt",), f'windows of text "{SELF}" begin with nothing'
    elif config.windows:
        unused, why = ("first",), "its windows go on from the beginnings of others"
    for name in unused:
        if (value := getattr(config, name)) != getattr(SelfTextConfig, name):
            raise ValueError(f"self_text.{name}={value} changes nothing: {why}; leave it out")
