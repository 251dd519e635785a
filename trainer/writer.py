"""Writes in the order in which they were asked for: at once, or in a thread beside the training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .checkpoint import snapshot

__all__ = ["Writer"]


class Writer:
    """Calls functions that write to the disk, one after the other.

    Args:
        is_asynchronous: Whether a thread calls them, with a copy of what they write.
    """

    def __init__(self, *, is_asynchronous: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints") if is_asynchronous else None
        self._pending: list[Future[None]] = []

    def __call__(self, write: Callable[[Any], None], contents: Any) -> None:
        """Call ``write(contents)``, or have the thread call it.

        Raises:
            OSError: The contents cannot be written; from a thread, `wait` raises it.
        """
        if self._thread is None:
            write(contents)
        else:
            self._pending.append(self._thread.submit(write, snapshot(contents)))

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            OSError: Something could not be written; the first such error.
        """
        pending, self._pending = self._pending, []
        errors = [error for error in (future.exception() for future in pending) if error is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()
        self.wait()
