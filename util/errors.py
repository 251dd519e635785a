"""A user's mistake is one line on stderr and an exit code, on one process or many."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable

from .distributed import is_lost_process, open_store
from .launch import Launch
from .logging import FILE_ONLY

__all__ = ["EXIT_FAILED", "EXIT_USER_ERROR", "RunError", "close_all", "exit_code_of"]

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
PATIENCE_SECONDS = 5.0  # how long a process waits to hear whether the logging one has said the same


class RunError(RuntimeError):
    """A run that could not continue.

    Args:
        message: The reason, and what remains of the run.
        exit_code: Of the process.
    """

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def close_all(*closers: Callable[[], None]) -> None:
    """Call every closer, whatever the others do; one that fails is reported, and hides no error before it."""
    for close in closers:
        try:
            close()
        except Exception as error:
            logger.warning("%s failed: %s", close.__qualname__, error)


def exit_code_of(
    find_launch: Callable[[], Launch],
    body: Callable[[Launch], int],
    *,
    is_bad_input: Callable[[Exception], bool] = lambda error: isinstance(error, (ValueError, OSError)),
) -> int:
    """Return what ``body`` returns, or say in one line why it failed and return the code for that.

    Bad input gives 2, a run that could not continue (RunError) 1. Anything else is a defect: its traceback is shown,
    and the code is 1. With several processes the logging one speaks; another speaks if that one has nothing to say.

    Args:
        find_launch: Finds the place of this process.
        body: The run.
        is_bad_input: Tells bad input from a defect: every ValueError and OSError, unless given.
    """
    launch = Launch()
    try:
        launch = find_launch()
        return body(launch)
    except Exception as error:
        logger.info("the run ended with an error", exc_info=True, extra=FILE_ONLY)
        message, code = _describe(error, is_bad_input=is_bad_input(error))
        _say_once(message, launch, is_echo=is_lost_process(error))
    return code


def _describe(error: Exception, *, is_bad_input: bool) -> tuple[str, int]:
    if isinstance(error, RunError):
        return f"error: {_one_line(error)}", error.exit_code
    if is_bad_input:
        return f"error: {_one_line(error)}", EXIT_USER_ERROR
    if is_lost_process(error):
        return f"error: another process of the run was lost: {_one_line(error)}", EXIT_FAILED
    return "".join(traceback.format_exception(error)).rstrip(), EXIT_FAILED


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _say_once(message: str, launch: Launch, *, is_echo: bool) -> None:
    """Print a message unless the logging process has said the same, or its own failure explains an echo of it."""
    if launch.is_logging:
        _print(message)
        if launch.world_size > 1:
            _tell_others(message, launch)
        return
    heard = _heard_from_logging(launch)
    if heard is None or not (is_echo or heard == message):
        _print(f"[rank {launch.rank}] {message}")


def _print(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(message, file=sys.stderr, flush=True)


def _tell_others(message: str, launch: Launch) -> None:
    # Where the store lives in this process, leaving at once would take it from those who still ask.
    with contextlib.suppress(RuntimeError, ValueError):
        store = open_store(launch, timeout_seconds=PATIENCE_SECONDS)
        store.set("failure/message", message)
        store.wait([f"failure/heard/{rank}" for rank in range(launch.world_size) if rank != launch.rank])


def _heard_from_logging(launch: Launch) -> str | None:
    try:
        store = open_store(launch, timeout_seconds=PATIENCE_SECONDS)
        message = store.get("failure/message").decode()
        store.set(f"failure/heard/{launch.rank}", "yes")
    except (RuntimeError, ValueError):
        return None
    return message
