"""Files that are found where a checkpoint should be: web pages of a download, pointers, archives."""

from __future__ import annotations

import html
import re
from pathlib import Path

from .messages import listed, neighbours

__all__ = ["check_kind", "web_page_title"]

OTHER_FILES = (  # offset, bytes found there, what the file then is
    (0, b"\x1f\x8b", "a gzip archive: unpack it and name the file inside"),
    (257, b"ustar", "a tar archive: unpack it and name the file inside"),
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
)


def check_kind(path: Path) -> None:
    """Raise where a path leads to something that often lies where a checkpoint should.

    Raises:
        FileNotFoundError: There is no such file; the nearest names in its folder are given.
        ValueError: It is a folder, a pipe or a device, or the file is empty, a web page, an archive or a pointer to
            another file.
    """
    if path.is_dir():
        files = listed(sorted(file.name for file in path.iterdir() if file.is_file())) or "nothing"
        raise ValueError(f"{path} is a folder, not a checkpoint: name a file in it (it holds {files})")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; {neighbours(path)}")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, not a file: name a checkpoint's file")
    with path.open("rb") as file:
        start = file.read(2048)
    if not start:
        raise ValueError(f"{path} is empty: the download or copy of it failed; get it again")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        title = web_page_title(start)
        shown = f" ({title!r})" if title else ""
        raise ValueError(
            f"{path} is a web page{shown}, not a checkpoint: the server sent a page in place of the file, as it does "
            "when a download quota is used up or a confirmation is asked for; download it again, later or in a browser"
        )
    for offset, magic, kind in OTHER_FILES:
        if start[offset:].startswith(magic):
            raise ValueError(f"{path} is {kind}")


def web_page_title(start: bytes) -> str:
    """Return the title of a web page, given its first bytes; empty where it has none."""
    title = re.search(r"<title[^>]*>(.*?)</title>", start.decode(errors="replace"), re.IGNORECASE | re.DOTALL)
    return html.unescape(title[1]).strip() if title else ""
