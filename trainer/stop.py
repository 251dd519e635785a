"""Reasons to stop: signals, noticed at once and acted on between two steps, by all processes together."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from util.distributed import Process
from util.errors import RunError

__all__ = ["WATCHED", "SignalError", "SignalWatch", "StopError", "stop_on_signal"]

# Schedulers send SIGTERM or SIGUSR1 ahead of the end of a job, a terminal sends SIGINT, and SIGHUP when it is closed.
# The first that came in wins.
WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
SIGNAL_EXIT = 128  # a shell adds this to the number of the signal that ended a process: 143, 130, 138, 129


class StopError(RunError):
    """All processes have agreed to stop here."""


class SignalError(StopError):
    """A process got a signal.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}", exit_code=SIGNAL_EXIT + number)


class SignalWatch:
    """A context in which the watched signals are only noted.

    A second SIGINT raises KeyboardInterrupt at once: the step that the first one waits for may hang in a read. Under
    torchrun it is only noted too: torchrun passes on the terminal's own a second time, and kills what does not end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._num_interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        for number in WATCHED:
            if not _is_refused(number):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt("ended at once by a second Ctrl-C")

    def flags(self) -> list[float]:
        """Return for each watched signal whether this process got it, to be summed over processes."""
        return [float(self.received == number) for number in WATCHED]

    @staticmethod
    def agreed(sums: list[float]) -> int | None:
        """Return the signal that any process got, from the summed flags."""
        return next((int(number) for number, total in zip(WATCHED, sums, strict=True) if total > 0), None)


def _is_refused(number: int) -> bool:
    """Return whether the run was started so that a closed terminal does not end it, as ``nohup`` does."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def stop_on_signal(process: Process, watch: SignalWatch) -> None:
    """Raise a SignalError on every process, if any got a signal; a collective."""
    number = watch.agreed(process.sum(watch.flags()))
    if number is not None:
        raise SignalError(number)
