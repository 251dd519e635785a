"""How a command ends: in what code and with which words."""

from __future__ import annotations

import pytest

from model.command import CommandError, exit_code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("bad entry"), 2, "error: bad entry"),
        (FileNotFoundError("no file"), 2, "error: no file"),
        (ImportError("install onnx"), 2, "error: install onnx"),
        (CommandError("the build failed"), 1, "error: the build failed"),
        (KeyboardInterrupt(), 130, "stopped; it continues"),
    ],
)
def test_an_ending_is_a_line_and_a_code(capsys, error, code, line):
    def run() -> None:
        raise error

    assert exit_code(run, interrupted="stopped; it continues") == code
    assert capsys.readouterr() == ("", f"{line}\n")


def test_the_command_gives_the_code():
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 1) == 1


def test_a_defect_keeps_its_traceback():
    with pytest.raises(KeyError):
        exit_code(lambda: {}["entry"])
