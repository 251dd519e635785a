"""How the commands of this package end."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["exit_code"]


def exit_code(run: Callable[[], object]) -> int:
    """Call what a command does; return 0, or 2 after its error in one line on stderr."""
    try:
        run()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
