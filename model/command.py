"""How the commands that run as one process end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

__all__ = ["CommandError", "exit_code"]

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it


class CommandError(RuntimeError):
    """A build that failed, or a check that found problems, though the input was good."""


def exit_code(run: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Call what a command does; return its exit code, 0 if it gives none, or say on stderr why it ended.

    Bad input, which raises ValueError, OSError, or ImportError where an optional package is missing, gives 2,
    a `CommandError` 1 and Ctrl-C 130. Anything else is a defect and keeps its traceback.

    Args:
        run: The command, its arguments parsed.
        interrupted: The line after Ctrl-C.
    """
    try:
        return run() or 0
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    except CommandError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return EXIT_INTERRUPTED
