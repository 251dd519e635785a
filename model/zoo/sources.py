"""The sources of a checkpoint that is not in its place on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from .entries import Entry
from .places import local_path, relative_path
from .transfer import DriveSource, FileSource, HttpSource, Source

__all__ = ["find_sources"]


def find_sources(entry: Entry, source: str | Path = "") -> list[Source]:
    """Return where to look for a checkpoint, in this order.

    Args:
        entry: The checkpoint.
        source: A mirror's address, or a folder of this machine, both laid out as ``weights/`` or flat; or the address
            or path of the file itself. The original source when empty.

    Raises:
        ValueError: If there is no such folder, or the checkpoint has no source.
    """
    text = str(source)
    path = relative_path(entry)
    names = (str(path), path.name)
    if not text:
        return [_original_source(entry)]
    if re.match("https?://", text):
        is_file = urlsplit(text).path.endswith(path.suffix)
        return [HttpSource(text)] if is_file else [HttpSource(f"{text.rstrip('/')}/{name}") for name in names]
    place = Path(text).expanduser()
    if place.is_file():
        return [FileSource(str(place))]
    if not place.is_dir():
        raise ValueError(f"{place}: there is no such folder or file to take {entry.name} from")
    found = [place / name for name in names if (place / name).is_file()]
    if not found:
        raise ValueError(f"{place} has neither {names[0]} nor {names[1]}: name the folder or the file itself")
    return [FileSource(str(found[0]))]


def _original_source(entry: Entry) -> Source:
    if entry.url:
        return HttpSource(entry.url)
    if entry.drive_id:
        return DriveSource(entry.drive_id, local_path(entry))
    raise ValueError(f"{entry.name} is not at {local_path(entry)}, and the list of checkpoints names no source for it")
