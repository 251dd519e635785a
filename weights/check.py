"""Measure released checkpoints and compare the published figures: ``python -m weights.check mobilemamba_t2``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from util.waiting import sleep_while_waiting

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names; return the exit code."""
    sleep_while_waiting()
    from .checking import check  # with PyTorch, which reads how its threads are to wait

    return check(arguments)


if __name__ == "__main__":
    sys.exit(main())
