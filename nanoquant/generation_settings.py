"""How texts are continued: the model's own generation config under a few settings."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # PreTrainedModel costs seconds and pulls in torchao and Triton
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OWN_OPTIONS = (
    "max_new_tokens max_length temperature top_p do_sample use_cache cache_implementation "
    "max_cache_len compile_config disable_compile"
).split()
"""Fields of GenerationConfig that the settings or the device decide."""
SAMPLING = "temperature top_p top_k min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
LOWEST = 1e-4
"""Temperature; below it logits over it overflow."""
OPTION_KINDS = {
    "stop_strings": (str, "a text or a list of texts"),
    **dict.fromkeys(
        ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
        (int, "a token or a list of them"),
    ),
}
LISTS = OPTION_KINDS.keys()
NESTED = ("bad_words_ids", "sequence_bias", "watermarking_config")
"""Options that transformers checks itself."""
MODES = ("greedy_search", "sample")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How texts are continued; null leaves it to the model's own generation config."""

    max_new_tokens: int | None = None
    """Most new tokens of a text; null: up to the model's own length limit, or 60 where it states none."""
    temperature: float | None = None
    """0 takes the most probable token each time, above 0 samples; null: as the model's own config says."""
    top_p: float | None = None
    """Sample from the most probable tokens that together reach this probability; null: the model's own."""
    seed: int = 0
    """Seed of the sampling; the global random state is left as it was."""
    chat: bool = False
    """Take a prompt as the user's turn, in the tokenizer's chat template."""
    batch: int = 8
    """Most prompts that run together, padded on the left."""
    compile: bool | None = None
    """Static cache and compiled decode steps, as CUDA graphs on a GPU; null: on a GPU, not on a CPU."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other fields of transformers' GenerationConfig, such as {"repetition_penalty": 1.1}."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        if self.temperature not in (None, 0) and not LOWEST <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; allowed: 0 (greedy) or {LOWEST} and above"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to {2**63 - 1}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: above 0 and up to 1")


def own_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> GenerationConfig:
    """The model's own generation config with the settings over it, but for lengths and caches.

    Raises:
        ValueError: an option is unknown or decided elsewhere, top_p is given without sampling, or
            the result is neither greedy nor sampling with one text a prompt.
    """
    config = copy.deepcopy(model.generation_config)
    known = sorted(config.to_dict().keys() - set(OWN_OPTIONS))
    for name, value in settings.options.items():
        _check_option(name, value, known)
        setattr(config, name, value)
    if settings.temperature is not None:
        config.do_sample = settings.temperature > 0
        config.temperature = settings.temperature
    if settings.top_p is not None:
        if not config.do_sample:
            raise ValueError("top_p needs sampling; give a temperature above 0 with it")
        config.top_p = settings.top_p
    if not config.do_sample:
        for name in SAMPLING:
            setattr(config, name, None)
    mode = config.get_generation_mode()
    if mode not in MODES or (config.num_return_sequences or 1) > 1:
        raise ValueError(
            f"the generation config asks for {mode.value} with {config.num_return_sequences or 1} texts a "
            f"prompt; allowed: {' or '.join(MODES)} with 1; change it by options, or call model.generate"
        )
    config.use_cache = True
    config.pad_token_id = _pad_token(model, tokenizer, config)
    return config


def end_tokens(config: GenerationConfig) -> set[int]:
    """Ids that end a text; may be empty."""
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _check_option(name: str, value: object, known: list[str]) -> None:
    """Refuse an option that would be lost."""
    if name in OWN_OPTIONS:
        raise ValueError(f"{name} can't be an option; the other settings decide it")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"there is no option {name!r}; options near it: {', '.join(near)}")
    if value is None:
        raise ValueError(f"option {name} is null, which leaves it to the model; give a value")
    kind, what = OPTION_KINDS.get(name, ((bool, int, float), "a number, true or false"))
    items = value if isinstance(value, list) and value and name in LISTS else [value]
    if name not in NESTED and not all(isinstance(item, kind) for item in items):
        raise ValueError(f"option {name} is {value!r}; it must be {what}")


def _pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> int | None:
    """Padding is masked, so any id of the vocabulary does: the pad token, else an end token; logged if replaced."""
    ends = sorted(end_tokens(config))
    candidates = [config.pad_token_id, tokenizer.pad_token_id, *ends, tokenizer.eos_token_id]
    rows = model.get_input_embeddings().num_embeddings
    chosen = next((id for id in candidates if id is not None and 0 <= id < rows), None)
    if config.pad_token_id not in (None, chosen):
        _say_replaced(config.pad_token_id, chosen, rows)
    return chosen


@functools.cache
def _say_replaced(pad_token: int, chosen: int | None, rows: int) -> None:
    """Log it, once a process."""
    logger.warning(
        "pad_token_id %s is not among the %d tokens of the vocabulary; %s pads instead",
        *(pad_token, rows, "nothing" if chosen is None else f"token {chosen}"),
    )
