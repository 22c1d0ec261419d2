"""``nanoquant serve`` answers as ``generate`` does, by transformers' own server, and refuses what it can't serve."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from command_line import call, refused
from packed_models import pack_randomly
from tiny_models import tiny_llama, tiny_tokenizer

import nanoquant
from nanoquant.serving import command

pytestmark = pytest.mark.usefixtures("untouched_process")

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
TURN = [{"role": "user", "content": "the river"}]
GREEDY = {"model": "out", "temperature": 0, "max_tokens": 12}
START_SECONDS = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed checkpoint with a chat template, beside its dense model."""
    parent = tmp_path_factory.mktemp("serve")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    dense = tiny_llama(tie=False)
    dense.save_pretrained(parent / "dense")
    tokenizer.save_pretrained(parent / "dense")
    nanoquant.save_pretrained(pack_randomly(dense), parent / "out", tokenizer=tokenizer)
    return parent / "out"


@pytest.fixture(scope="module")
def port(folder):
    """Port of a running server."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "nanoquant",
        "serve",
        "out",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    environment = os.environ | {"HF_HUB_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    with open(folder.parent / "log", "w") as log:
        server = subprocess.Popen(line, cwd=folder.parent, stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + START_SECONDS
        while not listens(port):
            log = (folder.parent / "log").read_text()
            assert server.poll() is None and time.monotonic() < end, log
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        assert server.wait(60) == 1  # as transformers serve ends when it is interrupted


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def ask(port, path, **body):
    """Status and text of an answer; GET without a body."""
    connection = http.client.HTTPConnection("localhost", port, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request(*(["POST", path, json.dumps(body), headers] if body else ["GET", path]))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def answer(port, path, **body):
    status, text = ask(port, path, **body)
    assert status == 200, text
    return json.loads(text)


def streamed(port, path, **body):
    """The events of a streamed answer."""
    status, text = ask(port, path, **body, stream=True)
    assert status == 200, text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def greedy(folder, prompt, chat=False):
    """Text and count of tokens of the library's own function."""
    model, tokenizer = nanoquant.load(folder), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = nanoquant.GenerationSettings(max_new_tokens=12, temperature=0, chat=chat)
    done = nanoquant.generate(model, tokenizer, prompt, settings)
    return done.texts[0], done.new_tokens[0]


@pytest.mark.slow
def test_chats_are_answered_as_generate_does_whole_and_streamed(folder, port):
    text, tokens = greedy(folder, "the river", chat=True)
    whole = answer(port, "/v1/chat/completions", messages=TURN, **GREEDY)
    assert whole["choices"][0]["message"]["content"] == text != ""
    assert whole["usage"]["completion_tokens"] == tokens
    events = streamed(port, "/v1/chat/completions", messages=TURN, **GREEDY)
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == text and sum(map(bool, pieces)) > 1


@pytest.mark.slow
def test_texts_are_continued_as_generate_does_whole_and_streamed(folder, port):
    text, _ = greedy(folder, "the river")
    whole = answer(port, "/v1/completions", prompt="the river", **GREEDY)
    assert whole["choices"][0]["text"] == text != ""
    events = streamed(port, "/v1/completions", prompt="the river", **GREEDY)
    assert "".join(event["choices"][0].get("text") or "" for event in events) == text


@pytest.mark.slow
def test_the_server_serves_this_model_alone_and_lists_those_of_the_hub_cache(port):
    assert answer(port, "/health") == {"status": "ok"}
    assert answer(port, "/v1/models") == {"object": "list", "data": []}
    status, text = ask(port, "/v1/completions", prompt="a", **(GREEDY | {"model": "other"}))
    assert status == 400 and "pinned to 'out'" in text


def test_the_checkpoint_and_its_flags_are_handed_on_by_the_name_that_was_given(
    folder, monkeypatch, capsys
):
    given = []
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(command, "check_packages", lambda: None)
    monkeypatch.setattr(command, "_hand_over", given.append)
    code, out, err = call(capsys, "serve", "./out/", "--port", "9000", "--compile")
    assert (code, out, given) == (0, "", [["out", "--port", "9000", "--compile"]])
    assert "requests name the model 'out'" in err and "no chat template" not in err


def test_help_is_that_of_the_server_and_says_what_to_install(capsys):
    code, out, _ = call(capsys, "serve", "--help")
    assert code == 0 and out.startswith("usage: nanoquant serve OUT")
    assert "nanoquant[serve]" in out and "--port" in out


def test_what_cannot_be_served_is_refused_by_name(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "check_packages", lambda: None)
    monkeypatch.setattr(command, "_hand_over", lambda arguments: pytest.fail("was handed over"))
    assert "before its flags" in refused(capsys, "serve", "--port", "8000")
    assert "there is no folder" in refused(capsys, "serve", tmp_path / "none")
    assert "has no quantization_config" in refused(capsys, "serve", folder.parent / "dense")
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors" in refused(capsys, "serve", cut)
    at = shutil.copytree(folder, tmp_path / "out@1")
    assert "'@' for a revision" in refused(capsys, "serve", at)


def test_a_missing_server_is_named_with_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert "pip install 'nanoquant[serve]'" in refused(capsys, "serve", folder)


def test_without_a_chat_template_the_endpoint_that_fails_is_named(
    folder, tmp_path, monkeypatch, capsys
):
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    monkeypatch.setattr(command, "_hand_over", lambda arguments: None)
    monkeypatch.setattr(command, "check_packages", lambda: None)
    code, _, err = call(capsys, "serve", plain)
    assert code == 0 and "/v1/completions answers, but /v1/chat/completions fails" in err
