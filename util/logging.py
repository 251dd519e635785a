"""Output of a run: console, log file, JSON lines of every epoch, TensorBoard, progress bars, tables."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = [
    "FILE_ONLY",
    "PROGRESS",
    "EpochLog",
    "ScalarLog",
    "add_log_file",
    "duration",
    "markdown_table",
    "progress_bar",
    "setup_console",
    "table",
]

LINE = "%(asctime)s %(levelname).1s %(message)s"
TIME = "%Y-%m-%d %H:%M:%S"

# Marks of a record, for the ``extra`` of a logging call.
FILE_ONLY = {"is_for_file": True}
PROGRESS = {"is_progress": True}  # left out where a live progress bar shows the same

T = TypeVar("T")


class _Console(logging.Handler):
    """Writes to stdout without tearing a progress bar on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, unless it is meant only for the file."""
        if getattr(record, "is_for_file", False) or (getattr(record, "is_progress", False) and sys.stderr.isatty()):
            return
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except Exception:
            self.handleError(record)


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
    console = _Console(level=logging.INFO if is_logging else logging.WARNING)
    prefix = "" if is_logging else f"[rank {rank}] "
    console.setFormatter(logging.Formatter(prefix + LINE, TIME))
    root.addHandler(console)
    root.setLevel(console.level)
    logging.captureWarnings(True)


class _LogFile(logging.FileHandler):
    """The log file of the current run in this process."""


def add_log_file(path: Path) -> None:
    """Append every record of this process to a file as well; the file of an earlier call is closed."""
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, _LogFile)]:
        root.removeHandler(earlier)
        earlier.close()
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(LINE, TIME))
    root.addHandler(handler)


class EpochLog:
    """One JSON object per epoch and line.

    Args:
        path: The file; made when missing.
        num_epochs: Epochs done before; later lines, of epochs that a resumed run repeats, are dropped.
    """

    def __init__(self, path: Path, *, num_epochs: int = 0) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _epoch_of(line) <= num_epochs]
        if kept != lines:
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one epoch's record, which has its number under ``epoch``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ScalarLog:
    """Scalars for TensorBoard.

    Args:
        folder: Where the event files go.
        step: Iterations done before; what an earlier run wrote after them is hidden.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and only the logging process needs it

        self._writer = SummaryWriter(str(folder), purge_step=step or None, flush_secs=30)

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Add one point to each named curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


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
