"""How a run ends: in what code and with which words."""

from __future__ import annotations

import pytest

from util.errors import RunError, exit_code_of
from util.launch import Launch, find_launch


def ending_with(error: BaseException) -> int:
    def body(launch: Launch) -> int:
        raise error

    return exit_code_of(Launch, body)


def test_the_body_gives_the_code():
    assert exit_code_of(Launch, lambda launch: 143) == 143


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("bad\n  entry"), 2, "error: bad entry"),
        (FileNotFoundError(2, "No such file", "/there"), 2, "error: /there: No such file"),
        (OSError("just words"), 2, "error: just words"),
        (RunError("stopped"), 1, "error: stopped"),
        (RunError("stopped", exit_code=2), 2, "error: stopped"),
        (ValueError(), 2, "error: ValueError"),
    ],
)
def test_a_mistake_is_one_line(capsys, error, code, line):
    assert ending_with(error) == code
    captured = capsys.readouterr()
    assert captured.err == f"{line}\n"
    assert captured.out == ""


def test_whose_error_it_is_can_be_told(capsys):
    def body(launch: Launch) -> int:
        raise ValueError("of another library")

    assert exit_code_of(Launch, body, is_bad_input=lambda error: "ours" in str(error)) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_defect_shows_where(capsys):
    assert ending_with(KeyError("entry")) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert "ending_with" not in text.splitlines()[-1]
    assert "KeyError: 'entry'" in text


def test_an_interrupt_is_left_alone():
    with pytest.raises(KeyboardInterrupt):
        ending_with(KeyboardInterrupt())


def test_a_launch_that_cannot_be_is_told_of(capsys):
    assert exit_code_of(lambda: find_launch({"RANK": "9", "WORLD_SIZE": "2"}), lambda launch: 0) == 2
    assert "rank 9" in capsys.readouterr().err
