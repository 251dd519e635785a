"""Where words and numbers go."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from util.logging import (
    FILE_ONLY,
    PROGRESS,
    EpochLog,
    LogGuard,
    ScalarLog,
    add_log_file,
    duration,
    failed_outputs,
    progress_bar,
    setup_console,
    table,
)

logger = logging.getLogger(__name__)


FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
ROOT = Path(__file__).resolve().parents[2]


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


@needs_full_device
def test_events_on_a_full_disk_are_an_error_at_once(tmp_path):
    log = ScalarLog(tmp_path)
    log.write({"a": 1.0}, step=0)
    (descriptor,) = [int(link.name) for link in Path("/proc/self/fd").iterdir() if "tfevents" in os.path.realpath(link)]
    full = os.open(FULL, os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)
    with pytest.raises(OSError, match="No space left on device"):
        log.write({"a": 1.0}, step=1)


def test_events_outlive_a_clock_that_is_set_back(tmp_path, monkeypatch):
    log = ScalarLog(tmp_path)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3e7)
    for step in range(50):  # more than any queue holds
        log.write({f"step{step}": 1.0}, step=step)
    (file,) = tmp_path.iterdir()
    assert b"step49" in file.read_bytes()


def test_a_log_that_fails_is_reported_once_and_dropped(caplog):
    guard = LogGuard()
    calls = []

    def fail(reason):
        calls.append(reason)
        raise OSError(28, "No space left on device")

    assert [guard("events", fail, "now"), guard("events", fail, "again"), guard("epochs", len, "abc")] == [
        None,
        None,
        3,
    ]
    assert calls == ["now"]
    assert caplog.text.count("events cannot be written (No space left on device): the run continues") == 1
    assert guard.failures == {"events": "No space left on device"}


@needs_full_device
def test_a_log_file_on_a_full_disk_is_reported_once(capsys):
    setup_console(is_logging=True)
    add_log_file(FULL)
    for number in range(3):
        logger.info("line %d", number)
    out, err = capsys.readouterr()
    assert [out.count(f"line {number}") for number in range(3)] == [1, 1, 1]
    assert out.count("/dev/full cannot be written to (No space left on device): the run continues") == 1
    assert err == ""
    assert failed_outputs() == {"/dev/full": "No space left on device"}


def test_a_defect_of_a_logging_call_is_still_shown(capsys):
    setup_console(is_logging=True)
    console = logging.getLogger().handlers[-1]
    console.handle(logger.makeRecord("name", logging.INFO, "file", 1, "%d", ("no number",), None))
    assert "no number" in capsys.readouterr().err
    assert failed_outputs() == {}


CLOSED_STDOUT = """
import logging, sys
from pathlib import Path
from util.logging import add_log_file, setup_console
setup_console(is_logging=True)
add_log_file(Path(sys.argv[1]))
for number in range(5000):
    logging.info("line %d", number)
print("to nobody")
"""


def test_a_run_whose_stdout_is_closed_continues_in_its_log(tmp_path):
    command = [sys.executable, "-c", CLOSED_STDOUT, str(tmp_path / "log.txt")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "line 0" in run.stdout.readline()
    run.stdout.close()
    assert (run.stderr.read(), run.wait(timeout=60)) == ("", 0)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("stdout cannot be written to (Broken pipe): the run continues without it") == 1
    assert "line 4999" in text


def test_a_name_that_the_encoding_lacks_is_escaped(tmp_path):
    script = CLOSED_STDOUT.replace("range(5000)", "['\\udcff \\u00e4']").replace("%d", "%s")
    command = [sys.executable, "-c", script, str(tmp_path / "log.txt")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "line \\udcff \\xe4" in done.stdout
    assert "line \\udcff \u00e4" in (tmp_path / "log.txt").read_text(encoding="utf-8")


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
