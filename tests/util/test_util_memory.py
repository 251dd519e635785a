from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from util.memory import frozen_objects

ROOT = Path(__file__).resolve().parents[2]
# Resident kB that freeing a touched block of 64 MiB gives back to the system.
FREED = """
import sys
import numpy as np
from util.memory import keep_freed_memory

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported")
    sys.exit()
block = np.ones(2**23)
before = resident()
del block
print(before - resident())
"""


def freed(how: str) -> str:
    command = [sys.executable, "-c", FREED, how]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_what_is_freed_stays_with_the_process():
    kept = freed("keep")
    if kept == "unsupported":
        pytest.skip("not glibc")
    assert int(freed("as it is")) > 50_000
    assert int(kept) < 10_000


def test_objects_are_frozen_within_and_free_again_after():
    before = gc.get_freeze_count()
    with frozen_objects():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
