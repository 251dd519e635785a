"""Shards behind an address, downloaded whole when the first image of one is read, and kept while there is room."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from model.files import SUFFIX, move_into_place
from model.zoo.transfer import HttpSource

from .block_order import WINDOW
from .cache import Cache
from .shard_index import Shard, ShardIndex, index_name, sha256_of

__all__ = ["SHA256_SUFFIX", "RemoteShards"]

logger = logging.getLogger(__name__)

SHA256_SUFFIX = ".sha256"
PAUSE_SECONDS = 300.0  # before a shard that could not be had is tried again: each of its images asks for it
NUM_ATTEMPTS = 2  # the first may resume what another version of the shard left


class RemoteShards:
    """The shards of one address.

    Several processes may ask for one shard at once: one downloads it, the others wait.

    Args:
        address: ``http://`` or ``https://`` and what follows, without the shards' names.
        cache: Where they are kept.
    """

    def __init__(self, address: str, cache: Cache) -> None:
        self.address = address.rstrip("/")
        self.cache = cache
        self.folder = cache.file("shards", self.address, "")
        self._failures: dict[str, tuple[float, str]] = {}

    def index(self, split: str) -> ShardIndex:
        """Return the index of a split; one that is here already is taken if it is still the address's own.

        Raises:
            ValueError: If there is none, or it is damaged.
            OSError: If it cannot be got or written.
        """
        name = index_name(split)
        try:
            sha256 = self._text(name + SHA256_SUFFIX).partition(" ")[0]
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.address} has no {name}{SHA256_SUFFIX}; where the shards lie, run `python -m data.prepare index "
                "FOLDER`, and publish what it writes beside them"
            ) from error
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{self.address}/{name}{SHA256_SUFFIX} holds no SHA-256; make it again there")
        path = self.folder / f"{sha256[:24]}-{name}"
        with self._locked(path):
            if not path.exists():
                self._fetch(name, path, sha256=sha256)
        return ShardIndex.load(path)

    def check_room(self, index: ShardIndex) -> None:
        """Check that the cache holds the shards that are read at the same time.

        Raises:
            ValueError: If it holds not even one of them.
        """
        largest = max(shard.num_bytes for shard in index.shards)
        if largest > self.cache.max_bytes:
            raise ValueError(f"{self.address}: a shard has {largest:,} bytes, more than data.cache_gb; raise that")
        if 2 * WINDOW * largest > self.cache.max_bytes:  # one window while another one begins
            message = "%s: %d shards are read at a time; with data.cache_gb below %.1f they are downloaded repeatedly"
            logger.warning(message, self.address, WINDOW, 2 * WINDOW * largest / 1e9)

    def path(self, shard: Shard) -> Path:
        """Return a shard's file, downloaded if need be.

        Raises:
            OSError: If it cannot be got or written, or is not the one that the index describes.
        """
        path = self.folder / shard.name
        failed_at, cause = self._failures.get(shard.name, (-PAUSE_SECONDS, ""))
        if time.monotonic() - failed_at < PAUSE_SECONDS:
            raise OSError(cause)
        try:
            self._ensure(shard, path)
        except OSError as error:
            self._failures[shard.name] = (time.monotonic(), str(error))
            raise
        with contextlib.suppress(OSError):  # another process may have removed it just now
            os.utime(path)
        return path

    def _ensure(self, shard: Shard, path: Path) -> None:
        if not _is_whole(path, shard):
            with self._locked(path):
                if not _is_whole(path, shard):
                    self._make_room(shard.num_bytes)
                    self._fetch(shard.name, path, sha256=shard.sha256, num_bytes=shard.num_bytes)

    def _fetch(self, name: str, path: Path, *, sha256: str, num_bytes: int | None = None) -> None:
        aside = path.with_name(path.name + SUFFIX)  # the same for every process, so that it can be resumed
        for _ in range(NUM_ATTEMPTS):
            HttpSource(f"{self.address}/{quote(name)}").get(aside, title=name)
            is_expected = num_bytes in (None, aside.stat().st_size) and sha256 in ("", sha256_of(aside))
            if is_expected:
                move_into_place(aside, path)
                return
            aside.unlink()
        raise OSError(f"{self.address}/{name} is not the file that the index describes: make the index again there")

    def _text(self, name: str) -> str:
        path = self.folder / f".{name}.{os.getpid()}{SUFFIX}"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            HttpSource(f"{self.address}/{quote(name)}").get(path, title=name)
            return path.read_text(encoding="ascii", errors="replace")
        finally:
            path.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the shards that were not opened for longest, of any address, until another one fits."""
        with self._locked(self.folder.parent / "room"):
            files = [(path.stat(), path) for path in self.folder.parent.glob("*/*.tar")]
            files.sort(key=lambda entry: entry[0].st_mtime)
            total = num_bytes + sum(status.st_size for status, _ in files)
            for status, path in files:
                if total <= self.cache.max_bytes:
                    break
                path.unlink(missing_ok=True)  # who has it open reads on
                total -= status.st_size

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            yield


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.exists() and path.stat().st_size == shard.num_bytes
