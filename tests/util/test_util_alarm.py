"""A wait that takes too long ends the process with one line; others pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

WAIT = """
import time
from util.alarm import Alarm
alarm = Alarm(0.3, lambda: {explain})
for _ in range(3):
    with alarm.waiting():
        time.sleep(0.2)
time.sleep(0.5)  # no wait
print("passed", flush=True)
with alarm.waiting():
    time.sleep(60)
"""


def run(explain: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WAIT.format(explain=explain)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=50, check=False)


def test_only_a_wait_that_is_too_long_ends_the_process():
    done = run("'nobody came'")
    assert (done.returncode, done.stdout, done.stderr) == (1, "passed\n", "error: nobody came\n")


def test_a_message_that_fails_ends_it_too():
    done = run("1 / 0")
    assert (done.returncode, done.stderr) == (1, "error: division by zero\n")
