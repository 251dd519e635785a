"""Getting a file: over HTTP, from Google Drive or from a folder of this machine.

Each source fills a file with a temporary name, resumes one that was begun, and flushes it to the disk. Its contents are
not verified here, but a web page in place of the file is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from ..other_files import web_page_title

__all__ = ["DownloadError", "DriveSource", "FileSource", "HttpSource", "Source", "check_space"]

logger = logging.getLogger(__name__)

CHUNK = 2**18
TIMEOUT_SECONDS = 60.0
MAX_FAILURES = 5  # in a row, without a byte gained
PAUSE_SECONDS = 1.0  # after the first failure; doubled after each further one
PASSING_CODES = (408, 425, 429, 500, 502, 503, 504)
LOST = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLError)


class DownloadError(OSError):
    """A file that cannot be downloaded or written; the message says the way out."""


class Source(ABC):
    """One place to get a file from.

    Args:
        address: What messages call it, and what tells it from other sources.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.tag = hashlib.sha256(address.encode()).hexdigest()[:8]

    def __str__(self) -> str:
        return self.address

    @abstractmethod
    def get(self, aside: Path, *, title: str) -> None:
        """Fill a file, resuming after what is there.

        Raises:
            FileNotFoundError: The source does not have it.
            DownloadError: It cannot be got or written; what was received stays, to be resumed.
        """


class FileSource(Source):
    """A file of this machine, copied."""

    def get(self, aside: Path, *, title: str) -> None:
        """Copy the file."""
        source = Path(self.address)
        size = source.stat().st_size
        check_space(aside, size)
        with source.open("rb") as stream, _writing(aside, "wb") as file, _bar(title, size) as bar:
            while chunk := stream.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


class HttpSource(Source):
    """A file behind a URL, resumed where the server knows ranges, and tried again when the connection is lost."""

    def get(self, aside: Path, *, title: str) -> None:
        """Download the file."""
        failures = 0
        while True:
            begun = _size(aside)
            try:
                if self._transfer(aside, title):
                    return
                cause = "the connection ended early"
            except urllib.error.HTTPError as error:
                cause = f"HTTP {error.code} {error.reason}"
                if error.code in (404, 410):
                    raise FileNotFoundError(f"{self} does not exist ({cause}): check the address") from error
                if error.code not in PASSING_CODES:
                    raise DownloadError(f"{self} was refused ({cause}): check the address, or try another") from error
            except LOST as error:
                cause = str(getattr(error, "reason", "") or error) or type(error).__name__
            failures = 1 if _size(aside) > begun else failures + 1
            if failures == MAX_FAILURES:
                raise DownloadError(
                    f"{self} cannot be got after {failures} attempts ({cause}): check the network and try again; "
                    f"the download resumes after {_size(aside):,} bytes"
                )
            pause = PAUSE_SECONDS * 2 ** (failures - 1)
            logger.warning("%s: %s after %s bytes; resuming in %g s", title, cause, f"{_size(aside):,}", pause)
            time.sleep(pause)

    def _transfer(self, aside: Path, title: str) -> bool:
        """Download from where the file ends; return whether it is complete, as far as the server says."""
        done = _size(aside)
        headers = {"User-Agent": "mobilemamba", "Accept-Encoding": "identity"}
        if done:
            headers["Range"] = f"bytes={done}-"
        try:
            response = urllib.request.urlopen(  # the list of checkpoints is checked: HTTP only # nosec B310
                urllib.request.Request(self.address, headers=headers), timeout=TIMEOUT_SECONDS
            )
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not done:
                raise
            if _range_of(error.headers) == (None, done):
                return True
            aside.unlink()  # longer than the file: it is of another one
            return False
        with response:
            self._refuse_page(response)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                start, total = _range_of(response.headers)
                if start != done:
                    aside.unlink()
                    return False
            else:
                done, total = 0, _number(response.headers.get("Content-Length"))
            return _receive(response, aside, title=title, done=done, total=total)

    def _refuse_page(self, response: http.client.HTTPResponse) -> None:
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            title = web_page_title(response.read(2048))
            raise DownloadError(
                f"{self} gives a web page ({title!r}) in place of the file, as servers do when a download quota is "
                "used up or a confirmation is asked for: try later, in a browser, or from another source"
            )


class DriveSource(Source):
    """A file on Google Drive, by way of gdown.

    Args:
        file_id: Its id.
        file: Where the file belongs, for messages.
    """

    def __init__(self, file_id: str, file: Path) -> None:
        super().__init__(f"https://drive.google.com/file/d/{file_id}/view")
        self.file_id = file_id
        self.file = file

    def get(self, aside: Path, *, title: str) -> None:
        """Download the file."""
        by_hand = f"download {self} in a browser and save it as {self.file}, or name a mirror or a folder as the source"
        try:
            import gdown  # only this source needs it
            from gdown.exceptions import DownloadError as GdownError
        except ImportError as error:
            raise DownloadError(
                f"{title} lies on Google Drive, which takes the package gdown: `pip install gdown`; or {by_hand}"
            ) from error
        with _bar(title, None) as bar:

            def show(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                gdown.download(
                    id=self.file_id,
                    output=str(aside),
                    quiet=True,
                    resume=True,
                    progress=show,
                    retries=MAX_FAILURES,
                    timeout=TIMEOUT_SECONDS,
                )
            except (GdownError, OSError) as error:
                if _is_full(error):
                    raise _full(aside) from error
                cause = " ".join(str(error).split())
                raise DownloadError(f"Google Drive does not give {title} ({cause}): try later, {by_hand}") from error
        with _writing(aside, "ab"):  # flushed to the disk, which gdown leaves to the system
            pass


def check_space(aside: Path, needed: int) -> None:
    """Raise before the disk is full rather than when it is.

    Raises:
        DownloadError: If there is no room for so many bytes more.
    """
    free = shutil.disk_usage(aside.parent).free
    if needed > free:
        raise _full(aside, f"{needed:,} bytes are needed, {free:,} are free")


def _receive(response: http.client.HTTPResponse, aside: Path, *, title: str, done: int, total: int | None) -> bool:
    check_space(aside, (total or done) - done)
    with _writing(aside, "ab" if done else "wb") as file, _bar(title, total, done) as bar:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
            done += len(chunk)
    return total is None or done == total


@contextlib.contextmanager
def _writing(aside: Path, mode: str) -> Iterator[IO[Any]]:
    """Open a file to write to, and flush to the disk what was written, whatever ended it."""
    try:
        with aside.open(mode) as file:
            try:
                yield file
            finally:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        if _is_full(error):
            raise _full(aside, str(error.strerror)) from error
        raise


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _full(aside: Path, detail: str = "the disk is full") -> DownloadError:
    return DownloadError(
        f"no room for {aside} ({detail}): free some space and try again; the download resumes after "
        f"{_size(aside):,} bytes"
    )


def _bar(title: str, total: int | None, done: int = 0) -> tqdm:  # type: ignore[type-arg]
    """Return a progress bar in bytes, shown only on a terminal."""
    return tqdm(desc=title, total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024, disable=None)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _range_of(headers: Message) -> tuple[int | None, int | None]:
    """Return the first byte and the whole size that ``Content-Range`` names, as far as it does."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
    return (_number(found[1]), _number(found[2])) if found else (None, None)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() else None
