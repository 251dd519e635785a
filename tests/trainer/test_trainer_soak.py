"""The run under random faults, in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import soak


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes of a run by Linux's list")
def test_a_disturbed_run_ends_like_one_left_alone(tmp_path, capsys):
    code = soak.main([str(tmp_path), "--minutes=0.4", "--epochs=20", "--seed=1"])
    told = capsys.readouterr().out
    sys.stdout.write(told)
    assert code == 0
    assert "equal bit for bit" in told
