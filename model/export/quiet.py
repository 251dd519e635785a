"""Loggers that the runtimes' tools would fill, or leave other than they were."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["log_as_it_was", "only_errors"]


@contextlib.contextmanager
def log_as_it_was(log: logging.Logger) -> Iterator[None]:
    """Undo what is done to a logger's level and filters meanwhile."""
    level, filters = log.level, list(log.filters)
    try:
        yield
    finally:
        log.setLevel(level)
        log.filters[:] = filters


@contextlib.contextmanager
def only_errors(log: logging.Logger) -> Iterator[None]:
    """Silence a logger, but not its handlers, which others may share; NNCF's `set_log_level` silences those too."""
    with log_as_it_was(log):
        log.setLevel(logging.ERROR)
        yield
