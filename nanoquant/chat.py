"""Conversations as text: messages through the chat template of the tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def render(messages: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:  # noqa: ANN401
    """The text that a model sees of a conversation.

    Args:
        messages: list of {"role": ..., "content": ...}, both strings.
        tokenizer: its chat template is used.
        where: file and line, for errors.

    Raises:
        ValueError: the tokenizer has no template, the template refuses the roles, or these are no messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f'{where} has "messages", but the tokenizer has no chat template; give plain text: a .txt file, '
            'or a .jsonl file with a "text" per line'
        )
    good = isinstance(messages, list) and messages and all(map(_is_message, messages))
    if not good:
        raise ValueError(
            f'{where}: "messages" must be a list of {{"role": TEXT, "content": TEXT}}, got {str(messages)[:80]}'
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{where}: the chat template refuses roles {roles}: {error}") from None


def _is_message(message: Any) -> bool:  # noqa: ANN401
    keys = ("role", "content")
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in keys)
