"""The command line."""

from __future__ import annotations

import pytest

from util.cli import parse_arguments


def test_defaults():
    parsed = parse_arguments(["-c", "configs/x"])
    assert vars(parsed) == {
        "config": "configs/x",
        "mode": "train",
        "logger_rank": 0,
        "dist_url": "env://",
        "sleep": 0.0,
        "overrides": [],
    }


def test_overrides_may_stand_anywhere():
    parsed = parse_arguments(["a.b=1", "-c", "x", "c=-2", "--sleep", "1.5", "-m", "ft", "d=e=f", "--logger_rank", "3"])
    assert parsed.overrides == ["a.b=1", "c=-2", "d=e=f"]
    assert (parsed.mode, parsed.sleep, parsed.logger_rank) == ("ft", 1.5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "x", "-m", "tran"], "tran"),
        (["-m", "train"], "--config"),
        (["-c", "x", "--sleep", "-1"], "--sleep"),
        (["-c", "x", "--logger_rank", "first"], "--logger_rank"),
        (["-c", "x", "--epochs", "3"], "--epochs"),
    ],
)
def test_mistakes(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
