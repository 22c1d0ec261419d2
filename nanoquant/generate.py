"""Continue texts by transformers' own ``generate``: prompts in batches, and what they took.

On a GPU a static cache lets transformers compile the decode step into CUDA graphs. On a CPU steps run
uncompiled over a growing cache: compiling a packed SmolLM2-135M took a minute there, and then a step 0.7
of its time, which pays off after thousands of tokens; ``compile=True`` asks for it.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanoquant.compiling import compiler_obstacle
from nanoquant.decoder import evaluation_mode, input_device, most_positions
from nanoquant.generation_settings import GenerationSettings, end_tokens, own_config
from nanoquant.shared_launch import prepare_for_decoding
from nanoquant.streaming import BatchStreamer, Write

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 60
"""Most new tokens where neither the settings nor the model say how many."""
CACHE_STEP = 256
"""Static caches are a multiple of this long, so that a longer prompt seldom compiles again."""


@dataclass(frozen=True)
class Generation:
    """Continued texts and what they took."""

    texts: list[str] = field(default_factory=list)
    """Continuation of each prompt, without the prompt and special tokens."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Tokens of each prompt, without padding."""
    new_tokens: list[int] = field(default_factory=list)
    """Tokens of each continuation, its end token included."""
    prefill_seconds: list[float] = field(default_factory=list)
    """From the prompts of a batch to its first new tokens."""
    step_seconds: list[float] = field(default_factory=list)
    """Every further step of every batch; the first ones hold the compilation, where there is one."""

    def figures(self) -> dict[str, Any]:
        """Texts, tokens, seconds, and tokens per second of prefill and decode; None where nothing was decoded."""
        decoded, seconds = sum(self.new_tokens) - len(self.new_tokens), sum(self.step_seconds)
        prefill = sum(self.prefill_seconds)
        return asdict(self) | {
            "prefill_seconds": prefill,
            "prefill_tokens_per_second": sum(self.prompt_tokens) / prefill,
            "step_seconds": statistics.median(self.step_seconds) if decoded else None,
            "decode_tokens": decoded,
            "decode_seconds": seconds,
            "decode_tokens_per_second": decoded / seconds if decoded else None,
        }


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    settings: GenerationSettings | None = None,
    write: Write | None = None,
) -> Generation:
    """Continue one text or several.

    Args:
        model: causal language model, dense or quantized.
        tokenizer: its tokenizer.
        prompts: texts to continue, or the user's turns with ``settings.chat``.
        settings: what goes over the model's own generation config.
        write: called with the number of a prompt, new text, and whether it was the last, as it comes.

    Raises:
        ValueError: a prompt is empty or too long with its new tokens, a setting does not fit the
            model, or compilation was asked for and does not work here.
    """
    settings = settings or GenerationSettings()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    check_prompts(prompts)
    config = own_config(model, tokenizer, settings)
    rows = [_encode(tokenizer, prompt, settings.chat) for prompt in prompts]
    lengths = [len(row) for row in rows]
    batches = [rows[at : at + settings.batch] for at in range(0, len(rows), settings.batch)]
    _check_padding(batches, config)
    new_tokens = _new_tokens(model, config, settings.max_new_tokens, lengths)
    _choose_cache(model, config, settings.compile)
    prepare_for_decoding(model)
    done = Generation(prompt_tokens=lengths)
    with contextlib.ExitStack() as stack:
        cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(cards))  # manual_seed seeds them all
        stack.enter_context(evaluation_mode(model))
        torch.manual_seed(settings.seed)
        for batch in batches:
            first = len(done.texts)
            streamer = BatchStreamer(tokenizer, len(batch), end_tokens(config), write, first)
            for new in _continue(model, tokenizer, batch, config, new_tokens, streamer):
                done.texts.append(tokenizer.decode(new, skip_special_tokens=True))
                done.new_tokens.append(len(new))
            done.prefill_seconds.append(streamer.prefill_seconds)
            done.step_seconds.extend(streamer.step_seconds)
    return done


def greedy_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> str:
    """The most probable continuation of one prompt."""
    return continue_greedily(model, tokenizer, prompt, max_new_tokens).texts[0]


def continue_greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> Generation:
    """The most probable continuation of one prompt, uncompiled: too short to compile for."""
    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=0, compile=False)
    return generate(model, tokenizer, prompt, settings)


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse what :func:`generate` can't continue; needs no model.

    Raises:
        ValueError: there is no prompt, or one is empty; names which.
    """
    if not prompts:
        raise ValueError("there is no prompt; give one text or more to continue")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise ValueError(f"{which} is empty; give some text to continue")


def check_sample(prompt: str, max_new_tokens: int) -> None:
    """Refuse what :func:`greedy_sample` can't continue; needs no model."""
    check_prompts([prompt])
    GenerationSettings(max_new_tokens=max_new_tokens)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own special tokens."""
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; generate without chat")
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise ValueError(f"the tokenizer makes no token of the prompt {prompt!r}; give other text")
    return ids


def _check_padding(batches: list[list[list[int]]], config: GenerationConfig) -> None:
    """Refuse a batch of prompts of different lengths where nothing can pad them."""
    ragged = any(len(row) != len(batch[0]) for batch in batches for row in batch)
    if ragged and config.pad_token_id is None:
        raise ValueError(
            "prompts of different lengths need padding, but model and tokenizer have neither a pad nor "
            'an end token; give options {"pad_token_id": ...}, or a batch of 1'
        )


def _new_tokens(
    model: PreTrainedModel, config: GenerationConfig, asked: int | None, lengths: list[int]
) -> int:
    """New tokens that go with the longest prompt; the model's own limit is theirs together."""
    longest = max(lengths)
    which = f"prompt {lengths.index(longest) + 1} has {longest} tokens"
    count = asked or config.max_new_tokens
    if count is None and config.max_length is not None:
        count = config.max_length - longest
        if count < 1:
            raise ValueError(
                f"{which}, but the model's generation config ends texts at max_length "
                f"{config.max_length}; shorten it, or say max_new_tokens"
            )
    count = count or SAMPLE_TOKENS
    positions = most_positions(model)
    if positions is not None and longest + count > positions:
        fits = f"ask for at most {positions - longest}, or " if positions > longest else ""
        raise ValueError(
            f"{which} and {count} new ones are asked for, but the model has {positions} positions; "
            f"{fits}shorten the prompt"
        )
    return count


def _choose_cache(model: PreTrainedModel, config: GenerationConfig, compiled: bool | None) -> None:
    """Static cache and compiled steps, or neither, in ``config``."""
    from transformers import CompileConfig

    device = input_device(model)
    obstacle = ""
    if compiled or (compiled is None and device.type == "cuda"):
        if not model._can_compile_fullgraph:
            obstacle = f"{type(model).__name__} does not run over a static cache"
        obstacle = obstacle or compiler_obstacle(device)
        if compiled and obstacle:
            raise ValueError(f"decode steps can't be compiled: {obstacle}; leave compile out")
        compiled = not obstacle
        if obstacle:
            logger.warning("decode steps run uncompiled, which is slower: %s", obstacle)
    config.disable_compile = not compiled
    if not compiled:
        return
    config.cache_implementation = "static"
    if device.type == "cpu":
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = True  # transformers leaves CPUs out


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    config: GenerationConfig,
    new_tokens: int,
    streamer: BatchStreamer,
) -> list[list[int]]:
    """New ids of each row up to its end token, that one included."""
    device = input_device(model)
    ids = _left_padded(batch, config.pad_token_id or 0).to(device)  # (B, T)
    mask = _left_padded([[1] * len(row) for row in batch], 0).to(device)
    width = ids.shape[1]
    _limit(model, config, width + new_tokens, new_tokens)
    out = model.generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        streamer=streamer,
        tokenizer=tokenizer,  # stop strings need it
    )
    out = getattr(out, "sequences", out)[:, width:].tolist()  # (B, new)
    padding = config.pad_token_id if config.stop_strings else None
    return [_until_end(row, end_tokens(config), padding) for row in out]


def _left_padded(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different lengths as (B, T), their ends aligned."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left")


def _limit(model: PreTrainedModel, config: GenerationConfig, total: int, new_tokens: int) -> None:
    """Set the limit by the field that the model uses itself: both fields would be warned about."""
    if model.generation_config.max_new_tokens is None:
        config.max_length = total
    else:
        config.max_new_tokens = new_tokens
    if config.cache_implementation == "static":
        length = -(-total // CACHE_STEP) * CACHE_STEP
        config.max_cache_len = min(length, most_positions(model) or length)


def _until_end(row: list[int], ends: set[int], padding: int | None) -> list[int]:
    """The row up to its first end token; without one, but for padding at its end."""
    for count, token in enumerate(row, start=1):
        if token in ends:
            return row[:count]
    while len(row) > 1 and row[-1] == padding:
        row = row[:-1]
    return row
