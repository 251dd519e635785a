"""An end with a message for a process that waits in vain: for NCCL, whose own time-out kills it without one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["Alarm"]

EXIT_CODE = 1


class Alarm:
    """Ends the process where it waits longer than agreed: the waiting thread cannot, as it is in the driver's hands.

    Args:
        seconds: How long one wait may take.
        explain: Returns the message, in one line; called by the alarm's own thread.
    """

    def __init__(self, seconds: float, explain: Callable[[], str]) -> None:
        self.seconds = seconds
        self.explain = explain
        self._deadline: float | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a wait: one that is still there after ``seconds`` ends the process."""
        self._set(time.monotonic() + self.seconds)
        try:
            yield
        finally:
            self._set(None)

    def _set(self, deadline: float | None) -> None:
        with self._changed:
            self._deadline = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="alarm", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                deadline = self._deadline
                if deadline is not None and time.monotonic() >= deadline:
                    self._end()
                self._changed.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    def _end(self) -> None:
        try:
            message = self.explain()
        except Exception as error:  # the message is the last thing that this process does
            message = str(error)
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)
