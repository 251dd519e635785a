"""Where words and numbers go."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from util.logging import (
    FILE_ONLY,
    PROGRESS,
    EpochLog,
    ScalarLog,
    add_log_file,
    duration,
    progress_bar,
    setup_console,
    table,
)

logger = logging.getLogger(__name__)


pytestmark = pytest.mark.usefixtures("own_log")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_logging_process_says_everything_once(capsys):
    setup_console(is_logging=True)
    setup_console(is_logging=True)
    logger.info("an info")
    logger.debug("a detail")
    out, err = capsys.readouterr()
    assert out.count("an info") == 1
    assert "a detail" not in out
    assert err == ""


def test_other_processes_only_warn(capsys):
    setup_console(is_logging=False, rank=3)
    logger.info("an info")
    logger.warning("a warning")
    out = capsys.readouterr().out
    assert "an info" not in out
    assert out.startswith("[rank 3] ")
    assert "a warning" in out


def test_the_file_has_what_the_console_leaves_out(capsys, tmp_path, monkeypatch):
    setup_console(is_logging=True)
    add_log_file(tmp_path / "log.txt")
    logger.info("a trace", extra=FILE_ONLY)
    logger.info("plain progress", extra=PROGRESS)
    monkeypatch.setattr(sys, "stderr", Terminal())
    logger.info("live progress", extra=PROGRESS)
    out = capsys.readouterr().out
    assert [line in out for line in ("a trace", "plain progress", "live progress")] == [False, True, False]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" I ")[1] for line in lines] == ["a trace", "plain progress", "live progress"]


def test_a_second_run_has_a_file_of_its_own(tmp_path):
    setup_console(is_logging=True)
    for name in ("first", "second"):
        add_log_file(tmp_path / name)
        logger.info("in %s", name)
    assert "in second" not in (tmp_path / "first").read_text()
    assert "in second" in (tmp_path / "second").read_text()


def test_the_bar_is_live_on_a_terminal_alone(capsys, monkeypatch):
    assert list(progress_bar(range(3), title="Epoch 1", total=3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(1, 3), title="Epoch 1", total=3, start=1)) == [1, 2]
    assert "Epoch 1" in terminal.getvalue()
    silent = Terminal()
    monkeypatch.setattr(sys, "stderr", silent)
    assert list(progress_bar(range(3), title="Epoch 1", total=3, is_shown=False)) == [0, 1, 2]
    assert silent.getvalue() == ""


def test_epochs_are_lines_and_later_ones_are_dropped(tmp_path):
    path = tmp_path / "epochs.jsonl"
    log = EpochLog(path)
    for epoch in (1, 2, 3):
        log.write({"epoch": epoch, "train": {"CE": 0.5}})
    with path.open("a") as file:
        file.write('{"epoch": 4, "tr')  # cut off
    EpochLog(path, num_epochs=2).write({"epoch": 3, "train": {"CE": 0.25}})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["epoch"], record["train"]["CE"]) for record in records] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_scalars_make_an_event_file(tmp_path):
    log = ScalarLog(tmp_path / "tensorboard")
    log.write({"train/CE": 0.5}, step=1)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/CE" in file.read_bytes()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00:00"), (59.9, "00:00:59"), (3661, "01:01:01"), (90061, "1 d 01:01:01"), (-1, "00:00:00")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_table():
    assert table(["weights", "top-1"], [["net", "73.638"], ["net_E", "9.5"]]).splitlines() == [
        "weights   top-1",
        "-------  ------",
        "net      73.638",
        "net_E       9.5",
    ]
