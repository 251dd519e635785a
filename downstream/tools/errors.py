"""A user's mistake is one line on stderr and exit code 2, on one process or many."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

__all__ = ["EXIT_INPUT_ERROR", "InputError", "exit_code_of"]

EXIT_INPUT_ERROR = 2
OURS = ("model", "downstream")
PATIENCE_SECONDS = 30.0  # the launcher ends the other processes of a node sooner, once its first one has spoken


class InputError(ValueError):
    """Something that the user can mend; the message says what and how."""


def exit_code_of(body: Callable[[], None]) -> int:
    """Return 0, or say what is wrong with the input and return the exit code for that.

    Such are `InputError`, and a ValueError or OSError that this repository raised, also where OpenMMLab says it again.
    Other errors are defects, or OpenMMLab's to explain, and keep their traceback. All processes of a node usually find
    the same, so that the first speaks, and another only where the first did not.
    """
    try:
        body()
    except (ValueError, OSError) as error:
        if not isinstance(error, InputError) and not _is_ours(error):
            raise
        local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        if local_rank:
            time.sleep(PATIENCE_SECONDS)
        speaker = f"[process {local_rank} of the node] " if local_rank else ""
        print(f"{speaker}error: {error}", file=sys.stderr, flush=True)
        return EXIT_INPUT_ERROR
    return 0


def _is_ours(error: BaseException) -> bool:
    """Return whether a ValueError or OSError, or what it came of, was raised by a line of this repository."""
    link: BaseException | None = error
    while isinstance(link, (ValueError, OSError)):
        *_, (frame, _) = traceback.walk_tb(link.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] in OURS:
            return True
        link = link.__cause__ or link.__context__
    return False
