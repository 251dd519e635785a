"""The pages of an LMDB file, checked before LMDB's library reads them.

The library maps the file into memory and trusts the page numbers and sizes in it: a damaged one leads it out of the
map, which kills the process. Here they are read as plain bytes. A file is a tree of pages, from the root that the
newer of its two first pages names, over branches to leaves; a value too long for its leaf has pages of its own.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

import numpy as np

__all__ = ["PageError", "Pages"]

MAGIC = 0xBEEFC0DE
NUM_METAS = 2
META = struct.Struct("=IIQQ" + 2 * "IHHQQQQQ" + "QQ")
NO_PAGE = 2**64 - 1  # the root of an empty tree
BRANCH, LEAF, DIRTY = 1, 2, 16  # kinds of pages; the last bit may be left over
LONG_VALUE = 1  # mark of an entry whose value has pages of its own
NODE_BYTES = 8  # before the key of an entry


class _Layout(NamedTuple):
    """What differs between the library's two formats; sizes in bytes."""

    version: int
    header: int  # of a page
    origin: int  # where the entries' positions count from
    key_step: int  # what a key's length is rounded up to
    long_value: int  # what stands in the leaf for a long value


LAYOUTS = (
    _Layout(version=1, header=16, origin=0, key_step=1, long_value=8),  # LMDB 0.9
    _Layout(version=3, header=24, origin=24, key_step=2, long_value=24),  # LMDB 1.0
)


class PageError(ValueError):
    """A file that is no LMDB file, or damaged; the message is the cause alone."""


class Pages:
    """The pages of a file, of a machine with this one's byte order and 64 bits.

    Args:
        file: Opened for reading.

    Attributes:
        num_bytes: How long the file has to be.

    Raises:
        PageError: If it is no LMDB file, or its first pages are damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = self._read(0, 24 + META.size)
        found = [layout for layout in LAYOUTS if _magic_and_version(start, layout) == (MAGIC, layout.version)]
        if not found:
            raise PageError("it does not start as one")
        self._layout = found[0]
        first = self._meta(start)
        self._page_size = first.page_size
        if self._page_size not in [1 << bits for bits in range(8, 17)]:
            raise PageError(f"pages of {self._page_size} bytes")
        second = self._meta(self._read(self._page_size, self._layout.header + META.size))
        if second[:3] != first[:3]:
            raise PageError("the first two pages contradict each other")
        newest = max(first, second, key=lambda meta: meta.transaction)
        if newest.flags:
            raise PageError("its keys are sorted in another way than by their bytes")
        self._root, self._num_pages = newest.root, newest.last_page + 1
        self.num_bytes = self._num_pages * self._page_size

    def check(self) -> None:
        """Follow the tree; only branches and leaves are read.

        Raises:
            PageError: If a page number or size leads elsewhere than to a page of the tree or a value in the file.
        """
        waiting = [] if self._root == NO_PAGE else [self._root]
        seen: set[int] = set()
        while waiting:
            number = waiting.pop()
            if not NUM_METAS <= number < self._num_pages or number in seen:
                raise PageError(f"page {number} is out of place")
            seen.add(number)
            page = self._read(number * self._page_size, self._page_size)
            if len(page) < self._page_size:
                raise PageError(f"page {number} is missing")
            waiting += self._children(page, number)

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        return self._file.read(length)

    def _meta(self, data: bytes) -> _Meta:
        if len(data) < self._layout.header + META.size:
            raise PageError("it ends within its first two pages")
        fields = META.unpack_from(data, self._layout.header)
        return _Meta(fields[0], fields[1], fields[4], fields[13], fields[19], fields[20], fields[21])

    def _children(self, page: bytes, number: int) -> list[int]:
        """Return the pages below a branch; check the values of a leaf."""
        header, origin = self._layout.header, self._layout.origin
        words = np.frombuffer(page, np.uint16).astype(np.int64)
        kind, lower = int(words[header // 2 - 3]) & ~DIRTY, int(words[header // 2 - 2]) + origin
        num_entries = (lower - header) // 2
        least = 2 if kind == BRANCH else 1
        if kind not in (BRANCH, LEAF) or num_entries < least or lower > self._page_size:
            raise PageError(f"page {number} is damaged")
        starts = words[header // 2 : header // 2 + num_entries] + origin
        if (starts % 2).any() or starts.min() < lower or starts.max() + NODE_BYTES > self._page_size:
            raise PageError(f"page {number} is damaged")
        low, high, marks, key_lengths = (words[starts // 2 + part] for part in range(4))
        key_ends = starts + NODE_BYTES + key_lengths
        if kind == BRANCH:
            if key_ends.max() > self._page_size:
                raise PageError(f"page {number} has a key beyond its end")
            return (low | high << 16 | marks << 32).tolist()
        self._check_values(page, number, key_ends + key_lengths % self._layout.key_step, low | high << 16, marks)
        return []

    def _check_values(
        self, page: bytes, number: int, starts: np.ndarray, lengths: np.ndarray, marks: np.ndarray
    ) -> None:
        is_long = marks == LONG_VALUE
        ends = starts + np.where(is_long, self._layout.long_value, lengths)
        if (marks & ~LONG_VALUE).any() or ends.max() > self._page_size:
            raise PageError(f"page {number} has a value beyond its end")
        places = starts[is_long, None] + np.arange(8)
        first = np.frombuffer(page, np.uint8)[places].view(np.uint64)[:, 0]
        num_pages = (self._layout.header - 1 + lengths[is_long]) // self._page_size + 1
        if (first >= self._num_pages).any() or (first.astype(np.int64) + num_pages > self._num_pages).any():
            raise PageError(f"page {number} names a value beyond the end of the file")


class _Meta(NamedTuple):
    """One of the two first pages, of which the one with the later transaction counts."""

    magic: int
    version: int
    page_size: int
    flags: int
    root: int
    last_page: int
    transaction: int


def _magic_and_version(start: bytes, layout: _Layout) -> tuple[int, int]:
    end = layout.header + 8
    return struct.unpack("=II", start[layout.header : end]) if len(start) >= end else (0, 0)
