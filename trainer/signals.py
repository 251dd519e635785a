"""Signals that ask a run to stop: noticed at once, acted on between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["WATCHED", "SignalWatch", "signal_exit_code"]

# Schedulers send SIGTERM or SIGUSR1 ahead of the end of a job, a terminal sends SIGINT. The first that came in wins.
WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


def signal_exit_code(number: int) -> int:
    """Return the shell's exit code of a process that a signal ended: 143, 130, 138."""
    return 128 + number


class SignalWatch:
    """While entered, the watched signals only leave a mark."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        for number in WATCHED:
            self._previous[number] = signal.signal(number, self._mark)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number

    def flags(self) -> list[float]:
        """Return for each watched signal whether this process got it, to be summed over processes."""
        return [float(self.received == number) for number in WATCHED]

    @staticmethod
    def agreed(sums: list[float]) -> int | None:
        """Return the signal that any process got, from the summed flags."""
        return next((int(number) for number, total in zip(WATCHED, sums, strict=True) if total > 0), None)
