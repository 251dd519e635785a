"""A small HTTP server for the tests: files in memory, ranges, and faults on request."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves ``files``, with the faults that the other attributes ask for.

    Attributes:
        files: By path, without the slash in front.
        cuts: For each of the next requests, bytes after which the connection is closed.
        statuses: For each of the next requests, a status in place of the file.
        has_ranges: Whether it supports them.
        has_length: Whether it sends the length of a file.
        location: An address to which every request is redirected.
        page: A web page, sent with status 200 whatever is asked for.
        requests: Path and ``Range`` of every request so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.has_ranges = True
        self.has_length = True
        self.location = ""
        self.page = b""
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path[1:], asked))
        if self.server.statuses:
            self.send_error(self.server.statuses.pop(0))
        elif self.server.location:
            self._send(302, b"", {"Location": self.server.location})
        elif self.server.page:
            self._send(200, self.server.page, {"Content-Type": "text/html; charset=utf-8"})
        elif self.path[1:] not in self.server.files:
            self.send_error(404)
        else:
            self._send_file(self.server.files[self.path[1:]], asked)

    def _send_file(self, contents: bytes, asked: str | None) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", asked or "") if self.server.has_ranges else None
        start = int(found[1]) if found else 0
        if found and start >= len(contents):
            self._send(416, b"", {"Content-Range": f"bytes */{len(contents)}"})
        elif found:
            span = f"bytes {start}-{len(contents) - 1}/{len(contents)}"
            self._send(206, contents[start:], {"Content-Range": span})
        else:
            self._send(200, contents, {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        if self.server.has_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(body)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body[:cut])

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
