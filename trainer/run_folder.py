"""The folder of a run: new or found for a resume, unique, writable, and used by one process at a time."""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunLock", "check_free_space", "make_run_folder"]

LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that cannot lock says one of these


def make_run_folder(parent: str | Path, name: str, *, resume_dir: str | Path = "") -> Path:
    """Make a new run's folder, ``parent/name_YYYYmmdd-HHMMSS``, or find that of a run to resume.

    Runs that start in the same second get different folders: the later ones' names end in ``-1``, ``-2``, ...
    Only for the one process that writes.

    Args:
        parent: Where runs are kept; made if missing.
        name: The run's name.
        resume_dir: A run's folder, or its name within ``parent``; a new folder is made when empty.

    Raises:
        ValueError: ``resume_dir`` is no folder; the nearest ones are named.
        OSError: The folder cannot be made or written to.
    """
    parent = Path(parent)
    if resume_dir:
        folder = _find_run(parent, Path(resume_dir))
    else:
        with _explained(parent):
            parent.mkdir(parents=True, exist_ok=True)
            folder = _make_unique(parent, f"{name}_{time.strftime('%Y%m%d-%H%M%S')}")
    with _explained(folder), tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(4096))  # a full disk lets an empty file be made
        probe.flush()
    return folder


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        way_out = "give the run a folder that can be written to with trainer.checkpoint=PATH"
        raise OSError(error.errno, f"cannot be written to ({error.strerror}); {way_out}", str(folder)) from error


def _make_unique(parent: Path, stem: str) -> Path:
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(1))):
        folder = parent / f"{stem}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("unreachable: the suffixes never end")


def _find_run(parent: Path, resume_dir: Path) -> Path:
    for folder in (resume_dir, parent / resume_dir):
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise ValueError(f"trainer.resume_dir={resume_dir} is a file: name the run's folder, {folder.parent}")
    runs = sorted(run.name for run in parent.iterdir() if run.is_dir()) if parent.is_dir() else []
    near = difflib.get_close_matches(resume_dir.name, runs, n=3, cutoff=0.0)
    known = f"the nearest in {parent}: {', '.join(near)}" if near else f"there is no run in {parent} either"
    raise ValueError(f"no folder trainer.resume_dir={resume_dir}; {known}")


def check_free_space(folder: str | Path, num_bytes: int) -> None:
    """Raise an OSError if fewer than ``num_bytes`` bytes are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"only {free / 2**20:,.0f} MiB are free and the checkpoints of this run need {num_bytes / 2**20:,.0f} MiB; "
            "free some or give the run another folder with trainer.checkpoint=PATH",
            str(folder),
        )


class RunLock:
    """Reserves a run's folder for this process until it ends, however it ends, or until `release`.

    It is a record lock of the operating system on a file in the folder, which neither outlives the process nor passes
    to the data workers that it forks; a second lock of the same process is not kept out. Where there are no such locks,
    a file that only one process can create takes its place, and one left behind by a dead process is taken over.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: Another process uses the folder; its id is named.
        OSError: The folder cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / LOCK
        self._claim: Path | None = None
        self._file = self._path.open("a+")
        is_ours = _lock_record(self._file)
        if is_ours is None:
            self._claim = self._path.with_suffix(".claim")
            is_ours = _make_claim(self._claim)
        if not is_ours:
            self._file.close()
            holder = (self._claim or self._path).read_text().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {holder}: wait for that run or stop it, or leave trainer.resume_dir empty to "
                f"start another{f'; if it is gone, delete {self._claim}' if self._claim else ''}"
            )
        self._file.truncate(0)
        self._file.write(f"{_signature()}\n")
        self._file.flush()

    def is_in_place(self) -> bool:
        """Return whether the folder still has this lock: not if it was deleted, moved or replaced."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        """Let another process use the folder."""
        if self._claim is not None and not self._file.closed:
            self._claim.unlink(missing_ok=True)
        self._file.close()


def _signature() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock_record(file: TextIO) -> bool | None:
    """Return whether the file could be locked; None where files cannot be."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _make_claim(claim: Path) -> bool:
    for _ in range(2):
        with contextlib.suppress(FileExistsError), claim.open("x") as file:
            file.write(f"{_signature()}\n")
            return True
        if not _is_abandoned(claim):
            return False
        claim.unlink(missing_ok=True)
    return False


def _is_abandoned(claim: Path) -> bool:
    """Return whether the process that made a claim ran on this machine and is gone."""
    signature = re.fullmatch(r"process (\d+) on (\S+)", claim.read_text().strip())
    if signature is None or signature[2] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(signature[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
