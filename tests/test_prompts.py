"""Prompts come from a file line by line; continuations go to the terminal as they are ready."""

import pytest

from nanoquant.prompts import printer, read_prompts


def test_every_line_is_a_prompt_with_its_spaces(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the river \n  a town", encoding="utf-8")
    assert read_prompts(str(file)) == ["the river ", "  a town"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the river\n\na town\n", "line 2 of .*prompts.txt is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (None, "there is no file .*prompts.txt"),
    ],
    ids=["blank line", "not UTF-8", "missing"],
)
def test_a_file_that_holds_no_prompts_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_one_prompt_is_printed_as_it_comes_and_several_when_they_have_ended(capsys):
    write = printer(["one"])
    write(0, "two ", False)
    assert capsys.readouterr().out == "two "
    write(0, "three", True)
    assert capsys.readouterr().out == "three\n"
    write = printer(["one", "two"])
    write(0, "a ", False)
    write(1, "b", True)
    assert capsys.readouterr().out == "> two\nb\n\n"
    write(0, "c", True)
    assert capsys.readouterr().out == "> one\na c\n\n"
