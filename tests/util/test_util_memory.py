"""Memory kept by a training process, and objects frozen for the garbage collector."""

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
# What Linux is advised of for each part of the heap.
ADVISED = """
from util.memory import keep_freed_memory

kept = keep_freed_memory()
block = bytearray(2**26)
parts = open("/proc/self/smaps").read().split("VmFlags:")
flags = [after.split("\\n")[0] for before, after in zip(parts, parts[1:]) if "[heap]" in before]
print(" ".join(flags) if kept else "unsupported")
"""


def printed(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the process")
def test_what_is_freed_stays_with_the_process():
    kept = printed(FREED, "keep")
    if kept == "unsupported":
        pytest.skip("not glibc")
    assert int(printed(FREED, "as it is")) > 50_000
    assert int(kept) < 10_000


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this Linux has no huge pages")
def test_the_heap_is_to_be_in_huge_pages():
    advised = printed(ADVISED)
    if advised == "unsupported":
        pytest.skip("not glibc")
    assert "hg" in advised.split()


def test_objects_are_frozen_within_and_free_again_after():
    before = gc.get_freeze_count()
    with frozen_objects():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
