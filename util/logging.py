"""Output of a run: console, log file, JSON lines of every epoch, TensorBoard, progress bars, tables.

A log can neither stop nor hang a run: one that cannot be written is reported once, then dropped.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from tqdm import tqdm

__all__ = [
    "FILE_ONLY",
    "PROGRESS",
    "EpochLog",
    "LogGuard",
    "ScalarLog",
    "add_log_file",
    "duration",
    "failed_outputs",
    "markdown_table",
    "open_scalar_log",
    "progress_bar",
    "setup_console",
    "table",
]

LINE = "%(asctime)s %(levelname).1s %(message)s"
TIME = "%Y-%m-%d %H:%M:%S"

# Marks of a record, for the ``extra`` of a logging call.
FILE_ONLY = {"is_for_file": True}
PROGRESS = {"is_progress": True}  # left out where a live progress bar shows the same

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class LogGuard:
    """Calls the writers of logs that a run can do without.

    A log whose writer raises an error, whatever it is, is reported once and not written to again.

    Attributes:
        failures: The reason for each log that was dropped, by its name.
    """

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    def __call__(self, name: object, write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what ``write`` returns; None if the log ``name`` fails or is dropped already."""
        if str(name) in self.failures:
            return None
        try:
            return write(*args, **kwargs)
        except Exception as error:
            self.failures[str(name)] = _reason(error)
            logger.warning("%s cannot be written (%s): the run continues without it", name, _reason(error))
            return None


def _reason(error: BaseException | None) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Output(logging.Handler):
    """A handler that reports to the others, once, that its file or pipe cannot be written to, and is silent from then.

    Attributes:
        title: Names the output.
        failure: The reason; empty while all is well.
    """

    title = ""
    failure = ""

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record, unless the output has failed before."""
        return bool(not self.failure and super().handle(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the output after an error of the system; show any other one, a defect of the logging call."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.failure = _reason(error)
        self.abandon()
        logger.warning("%s cannot be written to (%s): the run continues without it", self.title, self.failure)

    def abandon(self) -> None:
        """Let go of the output, so that what it still holds back disturbs nothing later."""


class _Console(_Output):
    """Writes to stdout without tearing a progress bar on the same terminal."""

    title = "stdout"

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, unless it is meant only for the file."""
        if getattr(record, "is_for_file", False) or (getattr(record, "is_progress", False) and sys.stderr.isatty()):
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)

    def abandon(self) -> None:
        """Point stdout at nothing: Python flushes it once more as it exits, and would fail."""
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())
            os.close(nothing)


def setup_console(*, is_logging: bool, rank: int = 0) -> None:
    """Send the log records of this process to stdout; processes that do not log only warn.

    A second call replaces what the first one set.

    Args:
        is_logging: Whether this is the process that logs.
        rank: Number of this process, shown in the others' warnings.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Console)]:
        root.removeHandler(handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    console = _Console(level=logging.INFO if is_logging else logging.WARNING)
    prefix = "" if is_logging else f"[rank {rank}] "
    console.setFormatter(logging.Formatter(prefix + LINE, TIME))
    root.addHandler(console)
    root.setLevel(console.level)
    logging.captureWarnings(True)


class _LogFile(_Output, logging.FileHandler):
    """The log file of the current run in this process."""

    @property
    def title(self) -> str:  # type: ignore[override]
        """The file's path."""
        return self.baseFilename

    def abandon(self) -> None:
        """Close the file without what could not be written."""
        with contextlib.suppress(OSError):
            if self.stream is not None:
                self.stream.close()
        self.stream = None  # type: ignore[assignment]


def add_log_file(path: Path) -> None:
    """Append every record of this process to a file as well; the file of an earlier call is closed."""
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, _LogFile)]:
        root.removeHandler(earlier)
        with contextlib.suppress(OSError):
            earlier.close()
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(LINE, TIME))
    root.addHandler(handler)


def failed_outputs() -> dict[str, str]:
    """Return the reason for each of this process's outputs, console and log file, that was dropped, by its name."""
    outputs = [handler for handler in logging.getLogger().handlers if isinstance(handler, _Output)]
    return {output.title: output.failure for output in outputs if output.failure}


class EpochLog:
    """One JSON object per epoch and line.

    Args:
        path: The file; made when missing.
        num_epochs: Epochs done before; later lines, of epochs that a resumed run repeats, are dropped.
    """

    def __init__(self, path: Path, *, num_epochs: int = 0) -> None:
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = list(itertools.takewhile(lambda line: line.endswith(b"\n") and _epoch_of(line) <= num_epochs, lines))
        if kept != lines:
            os.truncate(path, sum(map(len, kept)))  # needs no space, and no moment at which a kill could lose lines

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one epoch's record, which has its number under ``epoch``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted during the run
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _epoch_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ScalarLog:
    """Scalars for TensorBoard.

    Every point is on the disk when `write` returns. tensorboardX's own SummaryWriter leaves that to a thread: once it
    dies, of a full disk or of a clock that is set back, its queue fills and the next write never returns.

    Args:
        folder: Where the event files go.
        step: Iterations done before; what an earlier run wrote after them is hidden.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # slow to import; only the logging process needs it
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if step:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))
        self._writer.flush()

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Add one point to each named curve.

        Raises:
            OSError: If the file cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_scalar_log(folder: Path, *, step: int = 0) -> ScalarLog | None:
    """Return the log of a folder; None where tensorboardX is not installed, which is said once and harms no run.

    Args:
        folder: As for `ScalarLog`.
        step: The same.
    """
    try:
        return ScalarLog(folder, step=step)
    except ImportError as error:
        logger.info("no curves for TensorBoard, as %s is not installed (pip install tensorboardX)", error.name)
        return None


def progress_bar(items: Iterable[T], *, title: str, total: int, start: int = 0, is_shown: bool = True) -> tqdm[T]:  # type: ignore[type-arg]
    """Return the items, with a live bar on stderr when that is a terminal.

    Args:
        items: What is iterated.
        title: What the bar is of.
        total: Number of items with those done before.
        start: Items done before.
        is_shown: False on processes that do not log.
    """
    is_live = is_shown and sys.stderr.isatty()
    return tqdm(items, desc=title, total=total, initial=start, disable=not is_live, leave=False, dynamic_ncols=True)


def duration(seconds: float) -> str:
    """Return seconds as ``1 d 02:03:04``."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{days} d {clock}" if days else clock


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns under a header, the first column to the left, the others to the right."""
    widths = _widths(header, rows)
    is_right = [False, *[True] * (len(header) - 1)]
    rules = ["-" * width for width in widths]
    return "\n".join("  ".join(_aligned(line, widths, is_right)).rstrip() for line in (header, rules, *rows))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, is_right: Sequence[bool]) -> str:
    """Return rows as a table in Markdown, whose source is aligned too.

    Args:
        header: Names of the columns.
        rows: Cells of each row.
        is_right: Which columns are aligned to the right.
    """
    widths = [max(width, 2) for width in _widths(header, rows)]
    rules = ["-" * (width - right) + ":" * right for width, right in zip(widths, is_right, strict=True)]
    return "\n".join(f"| {' | '.join(_aligned(line, widths, is_right))} |" for line in (header, rules, *rows))


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *rows, strict=True)]


def _aligned(cells: Sequence[str], widths: Sequence[int], is_right: Sequence[bool]) -> list[str]:
    columns = zip(cells, widths, is_right, strict=True)
    return [cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns]
