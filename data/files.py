"""Images in a folder and its subfolders, and the content of one file."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from model.messages import listed, printable
from model.pictures import is_image_name, missing_decoders

__all__ = ["ImageSearch", "class_folders", "file_name", "left_out", "read_file"]

logger = logging.getLogger(__name__)


def read_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: If it cannot be read, or is a pipe or device: reading one might never end.
    """
    with open(path, "rb", opener=_open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "a pipe or device, not a regular file", str(path))
        return file.read()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for a writer


def file_name(text: str) -> str:
    """Return a file's name that a text in UTF-8 gives, as this process spells it: its locale may be another."""
    return os.fsdecode(text.encode(errors="surrogateescape"))


def class_folders(folder: Path) -> list[str]:
    """Return the names of the visible folders in ``folder``, sorted; empty where there is no such folder.

    Raises:
        ValueError: If it cannot be listed.
    """
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise _unlisted(error) from error


class ImageSearch:
    """Finds the images below a folder. Links are followed, but each real folder is searched once.

    Args:
        root: The folder; the names that are found are relative to it.
        class_names: Its class folders. Each is searched only for itself, wherever other links lead.

    Attributes:
        others: Files that are not images.
        repeated: Links to a folder that was searched before, is of another class, or contains ``root``.
        folders: Time of the last change, in ns, of each folder that was searched, as it was before the search.

    Raises:
        ValueError: If two class folders are the same folder.
    """

    def __init__(self, root: Path, class_names: Sequence[str] = ()) -> None:
        self.root = root
        self.others: list[Path] = []
        self.repeated: list[Path] = []
        self.folders = {name: (root / name).stat().st_mtime_ns for name in (".", *class_names)}
        real_root = root.resolve()
        self._seen = {_identity(folder) for folder in (real_root, *real_root.parents)}
        owners: dict[tuple[int, int], str] = {}
        for name in class_names:
            owner = owners.setdefault(_identity(root / name), name)
            if owner != name:
                raise ValueError(f"{root}: {printable(owner)} and {printable(name)} are the same folder; remove one")
        self._seen |= owners.keys()

    def images(self, subfolder: str = ".") -> list[str]:
        """Return the images in a subfolder, at any depth, as ``subfolder/file``.

        Raises:
            ValueError: If a folder cannot be listed.
        """
        names: list[str] = []
        for parent, subfolders, files in os.walk(self.root / subfolder, onerror=_refuse, followlinks=True):
            visible = sorted(name for name in subfolders if not name.startswith("."))
            subfolders[:] = [name for name in visible if self._is_new(Path(parent, name))]
            prefix = Path(parent).relative_to(self.root).as_posix()
            names += [f"{prefix}/{name}" for name in sorted(files) if is_image_name(name)]
            self.others += [Path(parent, name) for name in sorted(files) if not is_image_name(name)]
        return names

    def report(self) -> None:
        """Log which files are left out, and which links."""
        for level, remark in self.remarks():
            logger.log(level, "%s", remark)

    def report_links(self) -> None:
        """Log the links that are not followed."""
        for remark in self._link_remarks():
            logger.warning("%s", remark)

    def remarks(self) -> list[tuple[int, str]]:
        """Return which files are left out, and which links, each with its level of the log."""
        remarks = [(logging.WARNING, remark) for remark in self._link_remarks()]
        if self.others:
            is_missed = any(path.suffix.lower() in missing_decoders() for path in self.others)
            remark = f"{self.root}: {left_out(self.others)}"
            remarks.insert(0, (logging.WARNING if is_missed else logging.INFO, remark))
        return remarks

    def _link_remarks(self) -> list[str]:
        if not self.repeated:
            return []
        links = listed([printable(path) for path in self.repeated])
        what = f"{len(self.repeated)} links to folders that are read anyway, or that contain this one, are not followed"
        return [f"{self.root}: {what}: {links}"]

    def _is_new(self, folder: Path) -> bool:
        status = folder.stat()
        identity = status.st_dev, status.st_ino
        if identity in self._seen:
            self.repeated.append(folder)
            return False
        self._seen.add(identity)
        self.folders[folder.relative_to(self.root).as_posix()] = status.st_mtime_ns
        return True


def left_out(paths: Sequence[Path]) -> str:
    """Return a sentence on the files that are not images: their number by extension, and the first of them."""
    suffixes = Counter(printable(path.suffix.lower()) or "without extension" for path in paths)
    kinds = listed([f"{count} {suffix}" for suffix, count in suffixes.most_common()])
    hints = "".join(f"; {hint}" for suffix, hint in missing_decoders().items() if suffix in suffixes)
    return f"{len(paths)} stray files are ignored ({kinds}), the first is {printable(paths[0])}{hints}"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _unlisted(error: OSError) -> ValueError:
    return ValueError(
        f"{printable(error.filename)} cannot be listed ({error.strerror}), and its images would be missing; make it "
        "readable, or remove it"
    )


def _refuse(error: OSError) -> None:
    raise _unlisted(error) from error
