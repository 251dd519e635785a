"""How a process that trains keeps its memory: what a step frees, the next one needs again."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

__all__ = ["frozen_objects", "keep_freed_memory"]

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation, instead of handing it back to the system.

    By default glibc returns large blocks at once, and the system clears every page of theirs anew: tens of
    milliseconds a step on a CPU. The peak stays about the same.

    Returns:
        Whether the C library could be told so: glibc's can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))


@contextlib.contextmanager
def frozen_objects() -> Iterator[None]:
    """Keep Python's garbage collector from looking through all modules and imports again and again in a loop."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
