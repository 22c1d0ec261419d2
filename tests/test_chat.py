"""Conversations become the text that the tokenizer's template makes of them."""

import json

import pytest
from tiny_models import tiny_tokenizer

from nanoquant.chat import render
from nanoquant.data import bos_of, load_tokens, make_windows

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_messages_are_rendered_by_the_template_and_plain_text_is_left_alone(tmp_path, tokenizer):
    rows = [{"messages": TALK}, {"messages": TALK}, {"text": "one"}, {"text": "two"}]
    text = tokenizer.decode(load_tokens(jsonl(tmp_path / "a.jsonl", *rows), tokenizer))
    talk = "[user] Hi?\n[assistant] Hello.\n"
    assert text == talk + talk + "one\n\ntwo"


@pytest.mark.parametrize("adds", [True, False])
def test_a_template_that_begins_with_bos_gives_it_once_where_windows_begin_with_it(adds, tmp_path):
    tokenizer = tiny_tokenizer(add_bos=adds)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    tokens = load_tokens(jsonl(tmp_path / "a.jsonl", {"messages": TALK}), tokenizer)
    windows = make_windows(tokens, 8, bos_token_id=bos_of(tokenizer))
    assert windows[0].tolist().count(tokenizer.bos_token_id) == 1


def test_a_row_with_both_keeps_working_as_text(tmp_path, tokenizer):
    file = jsonl(tmp_path / "a.jsonl", {"text": "one", "messages": TALK})
    assert tokenizer.decode(load_tokens(file, tokenizer)) == "one"


def test_messages_without_a_template_name_the_formats_that_work(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"messages": TALK})
    with pytest.raises(
        ValueError, match=r'line 2 has "messages".*no chat template; .*\.txt file.*"text"'
    ):
        load_tokens(file, tiny_tokenizer())


@pytest.mark.parametrize(
    "messages",
    ["Hi?", [], ["Hi?"], [{"role": "user"}], [{"role": "user", "content": 3}], {"role": "user"}],
)
def test_what_is_no_conversation_is_shown(messages, tokenizer):
    with pytest.raises(ValueError, match='row 7: "messages" must be a list of .* got'):
        render(messages, tokenizer, "row 7")


def test_roles_that_the_template_refuses_are_named(tokenizer):
    with pytest.raises(ValueError, match="row 7: the chat template refuses roles tool: no tool"):
        render([{"role": "tool", "content": "x"}], tokenizer, "row 7")
