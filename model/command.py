"""How the commands of this package end."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["exit_code"]


def exit_code(run: Callable[[], int | None]) -> int:
    """Call what a command does; return its exit code, 0 if it gives none, or 2 after an error in one line on stderr.

    Errors are what bad input raises: ValueError, OSError, and ImportError where an optional package is missing.
    """
    try:
        return run() or 0
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
