"""A user's mistake is one line on stderr and exit code 2, on one process or many."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import util.errors
from util.launch import Launch, find_launch

__all__ = ["InputError", "exit_code_of"]

OURS = ("model", "downstream", "util")


class InputError(ValueError):
    """Something that the user can mend; the message says what and how."""


def exit_code_of(body: Callable[[], None]) -> int:
    """Return 0, or say what went wrong and return the exit code for that.

    Bad input is an `InputError`, and a ValueError or OSError that this repository raised, also where OpenMMLab says it
    again. Other errors are defects, or OpenMMLab's to explain, and keep their traceback.
    """

    def run(launch: Launch) -> int:
        body()
        return 0

    return util.errors.exit_code_of(find_launch, run, is_bad_input=_is_bad_input)


def _is_bad_input(error: Exception) -> bool:
    """Return whether a ValueError or OSError, or what it came of, was raised by a line of this repository."""
    if isinstance(error, InputError):
        return True
    link: BaseException | None = error
    while isinstance(link, (ValueError, OSError)):
        *_, (frame, _) = traceback.walk_tb(link.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] in OURS:
            return True
        link = link.__cause__ or link.__context__
    return False
