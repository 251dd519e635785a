"""Threads that sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import os, sys
from {module} import main
assert "torch" not in sys.modules
sys.argv = {arguments}
assert main() == 2
assert "torch" in sys.modules
print(os.environ.get("OMP_WAIT_POLICY"))
"""
COMMANDS = {"run": ["run.py", "-c", "no_such_config", "-m", "test"], "weights.check": ["check", "no_such_checkpoint"]}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "5"}, "None")],
    ids=str,
)
@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_decides_before_pytorch_is_there_unless_the_user_has(module, chosen, expected):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | chosen
    root = Path(__file__).parents[2]
    program = RUN.format(module=module, arguments=COMMANDS[module])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
