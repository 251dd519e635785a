"""From a name to a verified file on this machine, downloaded where it is not there yet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import SUFFIX, move_into_place
from .entries import Entry, find
from .places import local_path
from .sources import find_sources
from .transfer import DownloadError, Source
from .verification import verify

__all__ = ["fetch"]

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0  # before it is logged that another process is waited for


def fetch(checkpoint: str | Entry, *, source: str | Path = "") -> Path:
    """Return the local file of a released checkpoint, downloaded if need be, and verified.

    Several processes may ask for one checkpoint at once: one downloads it, the others wait and find it there.

    Args:
        checkpoint: A name, such as ``mobilemamba_t2s``, or an entry of a zoo file.
        source: Where to get it if it is not there: the address of a mirror, or a folder or file of this machine. Its
            original source when empty.

    Raises:
        ValueError: If there is no such checkpoint, or the file is not what it should be.
        OSError: If it cannot be got or written.
    """
    entry = find(checkpoint) if isinstance(checkpoint, str) else checkpoint
    file = local_path(entry)
    if not file.exists():
        sources = find_sources(entry, source)
        with _locked(file):
            if not file.exists():
                _download(entry, file, sources)
                return file
    verify(entry, file)
    return file


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock on a file's download; the lock's own file stays, as removing it would let two processes in."""
    lock = FileLock(f"{file}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        logger.info("another process is downloading %s: waiting for it", file)
        lock.acquire()
    except PermissionError as error:
        raise DownloadError(f"{file} cannot be written ({error.strerror}): make {file.parent} writable") from error
    try:
        yield
    finally:
        lock.release()


def _download(entry: Entry, file: Path, sources: list[Source]) -> None:
    """Get a file from the first source that has it, aside, check it, and put it in its place."""
    for number, source in enumerate(sources, start=1):
        # The name is the same for every attempt, so that a later one resumes, but only from the same source.
        aside = file.with_name(f"{file.name}.{source.tag}{SUFFIX}")
        try:
            _get_checked(entry, source, file, aside)
        except FileNotFoundError:
            if number == len(sources):
                raise
            continue
        move_into_place(aside, file)
        return


def _get_checked(entry: Entry, source: Source, file: Path, aside: Path) -> None:
    """Fill ``aside`` and check it; a resumed file that turns out wrong is downloaded once more from its start."""
    was_begun = aside.exists()
    logger.info("downloading %s from %s", entry.name, source)
    source.get(aside, title=entry.name)
    try:
        verify(entry, file, aside=aside)
    except ValueError as error:
        aside.unlink()
        if was_begun:
            logger.info("%s: the resumed file is not whole, so it is downloaded again (%s)", entry.name, error)
            _get_checked(entry, source, file, aside)
            return
        raise ValueError(f"{source} does not give {entry.name}: {error}") from error
