"""One split of a data set in an LMDB file: how it is laid out, read and written.

Values are pickles of ``(encoded image, class index)``. ``__keys__`` is a pickle of the list of their keys in order and
``__len__`` one of their number. Files that ``data.prepare`` wrote hold three more, which other readers ignore:
``__classes__`` (class names), ``__labels__`` and ``__paths__`` (``class/file`` per image).
"""

from __future__ import annotations

import io
import os
import pickle
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from model.files import remove_leftovers, replacing
from model.messages import printable

from .base import BytesTable
from .folders import checked_label
from .lmdb_pages import PageError, Pages

if TYPE_CHECKING:
    import lmdb

__all__ = ["LmdbFile", "write_lmdb"]

LENGTH, KEYS, CLASSES, LABELS, PATHS = b"__len__", b"__keys__", b"__classes__", b"__labels__", b"__paths__"
CHUNK_BYTES = 32 << 20  # what is held in memory between two commits
PICKLE_PROTOCOL = 4

# py-lmdb opens no file twice in a process, so readers of one file share its environment while any of them lives.
_environments: weakref.WeakValueDictionary[tuple[int, Path], lmdb.Environment] = weakref.WeakValueDictionary()


def _library() -> ModuleType:
    """Return the package that reads and writes these files; other data sets do without it."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("LMDB files need the package lmdb; install it with `pip install lmdb`") from error
    return lmdb


class LmdbFile:
    """A reader. The file is opened in each process when that process first reads from it.

    Args:
        path: The file, or a folder with ``data.mdb`` in it.

    Attributes:
        keys: Key per record.
        class_names: Name of each class, if stored.
        labels: Class index per record, if stored.
        paths: Path per record relative to the split's folder, if stored.

    Raises:
        ValueError: If it is missing, cut short or laid out otherwise, or the package lmdb is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data_file = path / "data.mdb" if path.is_dir() else path
        self._environment: lmdb.Environment | None = None
        self._process_id = -1
        self._num_bytes = 0
        if not path.exists():
            raise ValueError(f"{path} does not exist; make it with `python -m data.prepare folder-to-lmdb`")
        library = _library()
        try:
            self._read_contents()
        except (library.Error, PageError) as error:
            raise ValueError(f"{path} is no LMDB file, or is damaged ({error}); make it again") from error
        finally:
            self.close()  # no worker may inherit it open

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_environment": None, "_process_id": -1}

    def name(self, index: int) -> str:
        """Return the file, and the path or key of a record in it."""
        key = self.keys[index] if self.paths is None else self.paths[index]
        return printable(f"{self.path}:{os.fsdecode(key)}")

    def record(self, index: int) -> tuple[bytes, int]:
        """Return an encoded image and its class index.

        Raises:
            ValueError: If the record is missing, or is no pickle of ``(bytes, int)``, or the file was cut short.
        """
        try:
            self._refuse_cut()  # it may be overwritten during a run
            value = self._get(self.keys[index])
        except (_library().Error, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); make it again") from error
        if value is None:
            raise ValueError(f"{self.path} lacks {self.keys[index]!r}, which its __keys__ names; make it again")
        match _unpickle(value, name=self.name(index)):
            case [bytes(data), label, *_]:
                return data, checked_label(label, entry=self.name(index))
        raise ValueError(f"{self.name(index)}: the value is not (bytes, class index)")

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._environment = None

    def _open(self) -> lmdb.Environment:
        if self._environment is None or self._process_id != os.getpid():
            self._environment, self._process_id = _open_shared(self.path), os.getpid()
        return self._environment

    def _get(self, key: bytes) -> bytes | None:
        with self._open().begin() as transaction:
            return transaction.get(key)

    def _contents(self, key: bytes, kind: type, *, is_optional: bool = False) -> Any:
        value = self._get(key)
        if value is None and is_optional:
            return None
        content = None if value is None else _unpickle(value, name=f"{self.path}:{key.decode()}")
        if not isinstance(content, kind):
            raise ValueError(f"{self.path} has no {key.decode()}, or not a {kind.__name__}; make the file again")
        return content

    def _read_contents(self) -> None:
        self._check_pages()
        length = self._contents(LENGTH, int)
        keys = self._contents(KEYS, list)
        self.keys = BytesTable(key if isinstance(key, bytes) else str(key).encode() for key in keys)
        self.class_names: list[str] | None = self._contents(CLASSES, list, is_optional=True)
        labels = self._contents(LABELS, list, is_optional=True)
        paths = self._contents(PATHS, list, is_optional=True)
        self.labels = None
        if labels is not None:
            entry = f"{self.path}:{LABELS.decode()}"
            self.labels = np.asarray([checked_label(label, entry=entry) for label in labels], dtype=np.int64)
        self.paths = None if paths is None else BytesTable(path.encode(errors="surrogateescape") for path in paths)
        num_extras = sum(extra is not None for extra in (self.class_names, labels, paths))
        counts = {
            "records": self._open().stat()["entries"] - 2 - num_extras,
            "__len__": length,
            "__keys__": len(keys),
            "__labels__": length if labels is None else len(labels),
            "__paths__": length if paths is None else len(paths),
        }
        if len(set(counts.values())) > 1:
            raise ValueError(f"{self.path}: the counts differ ({counts}); make the file again")

    def _check_pages(self) -> None:
        """Refuse a file whose pages would lead LMDB's library astray."""
        if not self._data_file.is_file():
            raise ValueError(f"{self._data_file} is missing or is no regular file; make it again")
        if self._data_file.stat().st_size == 0:
            raise ValueError(f"{self._data_file} is empty; make it again")
        with self._data_file.open("rb") as file:
            pages = Pages(file)
            self._num_bytes = pages.num_bytes
            self._refuse_cut()
            pages.check()

    def _refuse_cut(self) -> None:
        """Refuse a file that is cut short: reading a page beyond its end would kill the process."""
        size, expected = self._data_file.stat().st_size, self._num_bytes
        if size < expected:
            raise ValueError(f"{self._data_file} is cut short: {size} of {expected} bytes; copy or make it again")


class _PlainUnpickler(pickle.Unpickler):
    """Loads containers, bytes, strings and numbers. Anything else could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}; only plain bytes, numbers, strings and lists are read")


def _unpickle(data: bytes, *, name: str) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"{name}: refused to unpickle the value: {error}") from error


def _open_shared(path: Path) -> lmdb.Environment:
    """Return this process's environment for a file, opened if it is not open yet."""
    real_path = path.resolve()
    key = (os.getpid(), real_path)
    for (process_id, other_path), inherited in list(_environments.items()):
        if other_path == real_path and process_id != os.getpid():
            inherited.close()  # LMDB's handles do not survive a fork
    environment = _environments.get(key)
    if environment is None:
        environment = _library().open(
            str(real_path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
        )
        _environments[key] = environment
    return environment


def write_lmdb(
    path: Path,
    records: Iterable[tuple[str, bytes, int]],
    *,
    class_names: Sequence[str],
    map_size: int = 1 << 30,
) -> int:
    """Write a split; the file appears only when it is complete.

    Args:
        path: The file; replaced if it is there.
        records: Path within the split's folder, encoded image and class index; streamed.
        class_names: Name of each class.
        map_size: Bytes that the file may take at first; doubled as often as needed.

    Returns:
        The number of records.

    Raises:
        OSError: If the disk is full or the folder cannot be written to.
        ValueError: If the package lmdb is not installed.
    """
    library = _library()
    remove_leftovers(path.parent, path.name)
    try:
        with (
            replacing(path) as aside,
            library.open(str(aside), subdir=False, map_size=map_size, lock=False, sync=False) as environment,
        ):
            num_records = _write(environment, records, class_names)
            environment.sync(True)
    except library.Error as error:
        raise OSError(f"{path} could not be written: {error}") from error
    return num_records


def _write(environment: lmdb.Environment, records: Iterable[tuple[str, bytes, int]], class_names: Sequence[str]) -> int:
    paths: list[str] = []
    labels: list[int] = []
    for chunk in _chunks(records):
        entries = [
            (_key(index), pickle.dumps((data, label), PICKLE_PROTOCOL))
            for index, (_, data, label) in enumerate(chunk, start=len(paths))
        ]
        paths += [name for name, _, _ in chunk]
        labels += [label for _, _, label in chunk]
        _commit(environment, entries)
    contents = {
        CLASSES: list(class_names),
        KEYS: [_key(index) for index in range(len(paths))],
        LABELS: labels,
        LENGTH: len(paths),
        PATHS: paths,
    }
    _commit(environment, [(key, pickle.dumps(value, PICKLE_PROTOCOL)) for key, value in contents.items()])
    return len(paths)


def _key(index: int) -> bytes:
    return b"%010d" % index


def _chunks(records: Iterable[tuple[str, bytes, int]]) -> Iterator[list[tuple[str, bytes, int]]]:
    """Group records into lists of about ``CHUNK_BYTES``."""
    chunk: list[tuple[str, bytes, int]] = []
    num_bytes = 0
    for record in records:
        chunk.append(record)
        num_bytes += len(record[1])
        if num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _commit(environment: lmdb.Environment, entries: Sequence[tuple[bytes, bytes]]) -> None:
    """Store entries whose keys ascend, in one transaction; as often as it takes for the map to be large enough."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value, append=True)
        except _library().MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
        else:
            return
