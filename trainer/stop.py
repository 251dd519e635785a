"""Reasons for all processes to stop together, between two steps, with the state saved."""

from __future__ import annotations

import signal

from util.errors import RunError

from .signals import signal_exit_code

__all__ = ["SignalError", "StopError"]


class StopError(RunError):
    """All processes have agreed to stop here."""


class SignalError(StopError):
    """A process got a signal.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}", exit_code=signal_exit_code(number))
