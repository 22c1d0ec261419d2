"""Generate text with a causal language model and its own generation settings."""

import contextlib
import copy
from typing import TYPE_CHECKING

import torch

from nanoquant.decoder import evaluation_mode, input_device

if TYPE_CHECKING:
    # PreTrainedModel costs seconds and pulls in torchao and Triton
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE_TOKENS = 60
"""Most new tokens of a sample, unless asked otherwise."""


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Continue a prompt.

    Args:
        model: Causal language model; its generation config says how to sample and where to stop.
        tokenizer: Its tokenizer.
        prompt: Text to continue, or the user's turn when ``chat`` is set.
        max_new_tokens: Largest number of tokens to generate.
        temperature: 0 takes the most probable token every time; above 0 samples.
        seed: Seed of the sampling; the global random state is left as it was.
        chat: Wrap the prompt in the tokenizer's chat template.

    Returns:
        The generated text, without the prompt and without special tokens.

    Raises:
        ValueError: The prompt is empty, a number is out of range, or there is no chat template.
    """
    check_prompt(prompt, max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; allowed: 0 (greedy) or above")
    ids = _encode(tokenizer, prompt, chat).to(input_device(model))
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    config.use_cache = True
    config.do_sample = temperature > 0
    if temperature > 0:
        config.temperature = temperature
    else:
        config.temperature = config.top_p = config.top_k = None
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    devices = [ids.device] if ids.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(evaluation_mode(model))
        torch.manual_seed(seed)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, generation_config=config)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def check_prompt(prompt: str, max_new_tokens: int) -> None:
    """Refuse what :func:`generate` can't continue; needs no model.

    Raises:
        ValueError: The prompt is empty, or no new token is asked for.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text to continue")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")


def _encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, chat: bool) -> torch.Tensor:
    """Token ids (1, n) of the prompt, with the tokenizer's own special tokens."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; generate without chat")
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
