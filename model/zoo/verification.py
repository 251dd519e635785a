"""Verification of checkpoints' files.

The first time, a file is read and compared, entry by entry, with the network that it is for; its size and SHA-256 are
then recorded next to it. From then on, or from the start where a checksum is published, the file must match them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import AVERAGED, HEADS, read_checkpoint, select_state_dict
from ..files import replacing
from ..mismatch import INSIDE_MODEL, compare, explain
from ..mobilemamba import VARIANTS, MobileMamba, variant_shapes
from .entries import Entry
from .training_state import reading_histories

__all__ = ["Checksum", "check_contents", "record_path", "verify"]

logger = logging.getLogger(__name__)

DOWNSTREAM_ENTRIES = Path(__file__).with_name("downstream_entries.json")
CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Checksum:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size:,} bytes, SHA-256 {self.sha256}"


def verify(entry: Entry, file: Path, *, aside: Path | None = None) -> Checksum:
    """Check a checkpoint's file and return its checksum, which is recorded the first time.

    Args:
        entry: What it should be.
        file: Where it belongs.
        aside: Where it is instead, just after the download.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it cannot be read, does not hold the network's entries, or is not the file that was recorded or
            published.
    """
    present = aside or file
    expected, origin = _expected(entry, file, present)
    if expected is None or aside:
        check_contents(entry, present)
    found = _checksum(present)
    if expected is None:
        _record(entry, file, found)
    elif found != expected:
        raise ValueError(f"{present} has {found}, but {origin} says {expected}: {_way_out(entry, file, aside)}")
    return found


def record_path(file: Path) -> Path:
    """Return where size and SHA-256 of a checkpoint are recorded."""
    return file.with_name(f"{file.name}.json")


def _way_out(entry: Entry, file: Path, aside: Path | None) -> str:
    again = "take it from another source" if aside else f"delete it and get {entry.name} again"
    return again if entry.sha256 else f"{again}, or, if the change is meant, delete {record_path(file)}"


def _expected(entry: Entry, file: Path, present: Path) -> tuple[Checksum | None, str]:
    """Return the checksum that a file must have, None where it is not known yet, and who says so."""
    if entry.sha256:
        return Checksum(entry.size or _size(present), entry.sha256.lower()), "the list of checkpoints"
    record = record_path(file)
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return Checksum(int(values["size"]), str(values["sha256"])), f"its record {record}"
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{record} is damaged ({error}): delete it to have {file} verified again") from error


def _size(file: Path) -> int:
    return file.stat().st_size


def _checksum(file: Path) -> Checksum:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return Checksum(_size(file), digest.hexdigest())


def _record(entry: Entry, file: Path, checksum: Checksum) -> None:
    values = {
        "name": entry.name,
        "size": checksum.size,
        "sha256": checksum.sha256,
        "verified": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        with replacing(record_path(file)) as aside:
            aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:  # somebody else's folder, say: the file is good all the same
        logger.info("%s is verified, but that cannot be recorded next to it: %s", file, error)


def check_contents(entry: Entry, file: Path) -> None:
    """Read a checkpoint and compare names and shapes of what it holds with the network that it is for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is damaged, or is of another network.
    """
    is_classifier = entry.task == "imagenet"
    with contextlib.nullcontext() if is_classifier else reading_histories():
        checkpoint = read_checkpoint(file, mmap=True)
    own = _own_entries(entry)
    has_average = any(isinstance(checkpoint.get(name), Mapping) for name in AVERAGED)
    for ema in (False, True) if has_average else (False,):
        weights, source = select_state_dict(checkpoint, ema=ema, origin=file)
        report = compare(weights, own, source=source)
        if not report.fits:
            reasons = explain(
                report,
                weights,
                own,
                heads=HEADS if is_classifier else (),
                variants=variant_shapes if is_classifier else None,
            )
            raise ValueError("\n  ".join([f"{file} ({source}) is not {entry.name} ({entry.network}).", *reasons]))


def _own_entries(entry: Entry) -> dict[str, Tensor]:
    """Return what a checkpoint must hold, as tensors without memory."""
    with torch.device("meta"):
        network = MobileMamba(**{**VARIANTS[entry.network], "num_classes": entry.dataset.num_classes})
        if entry.task == "imagenet":
            return network.state_dict()
        network.reset_classifier(0)
        backbone = {f"{INSIDE_MODEL}{name}": value for name, value in network.state_dict().items()}
        others = {name: torch.empty(shape) for name, shape in _outside_backbone(entry).items()}
    return {**backbone, **others}


def _outside_backbone(entry: Entry) -> dict[str, list[int]]:
    lists = _downstream_entries()
    if entry.entries not in lists:
        raise ValueError(f"{entry.name}: there is no list of entries {entry.entries!r}, only {', '.join(lists)}")
    return lists[entry.entries]


@functools.cache
def _downstream_entries() -> dict[str, dict[str, list[int]]]:
    return json.loads(DOWNSTREAM_ENTRIES.read_text(encoding="utf-8"))
