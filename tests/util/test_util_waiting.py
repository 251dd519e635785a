"""Threads that sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import os, sys
import run
assert "torch" not in sys.modules
sys.argv = ["run.py", "-c", "no_such_config", "-m", "test"]
assert run.main() == 2
assert "torch" in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "5"}, "None")],
    ids=str,
)
def test_a_run_decides_before_pytorch_is_there_unless_the_user_has(chosen, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | chosen
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", RUN], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
