"""How the threads of PyTorch's parallel regions wait for each other."""

from __future__ import annotations

import os

__all__ = ["sleep_while_waiting"]

# Whoever sets one of these has chosen.
CHOICES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def sleep_while_waiting() -> None:
    """Let them sleep; to be called before PyTorch is imported, which reads the environment.

    Otherwise they spin, and on a machine with other work keep the thread that they wait for from its core.
    """
    if not CHOICES & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"
