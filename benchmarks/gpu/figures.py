"""The file of a report: JSON lines, one a figure, each on the disk before the next is measured."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FILE", "Case", "Figures", "key_of", "read"]

FILE = "gpu-report.jsonl"

Case = Mapping[str, Any]


def key_of(step: str, case: Case) -> str:
    """Return what tells a case from all others."""
    return json.dumps([step, case], sort_keys=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file in their order; one that was cut short by a kill is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class Figures:
    """Appends lines to the file of a report, for one run of it.

    Several processes may write to one file at once: a line is a single write.

    Args:
        path: The file; made when missing.
        run: Name of the run, which stands in each of its lines.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run

    def write(self, step: str, case: Case, **fields: Any) -> dict[str, Any]:
        """Append one line, and return what it holds.

        Args:
            step: Name of the step.
            case: Names the case; empty for the step as a whole.
            **fields: ``figures`` (by name), ``passed`` (None: nothing to pass), ``error`` (empty: none), ``seconds``.
        """
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = {"run": self.run, "time": now, "step": step, "case": dict(case), **fields}
        data = json.dumps(line, default=str).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, data)
            os.fsync(file)
        finally:
            os.close(file)
        return line

    def done(self, *, earlier: bool) -> set[str]:
        """Return the keys of the cases that need not run (again).

        Args:
            earlier: Whether figures of earlier runs count; those that failed there are tried again.
        """
        return {
            key_of(line["step"], line["case"])
            for line in read(self.path)
            if line["case"] and (line["run"] == self.run or (earlier and not line.get("error")))
        }

    def find(self, step: str, case: Case) -> dict[str, Any] | None:
        """Return the latest figures of a case, None where there are none."""
        key = key_of(step, case)
        found = None
        for line in read(self.path):
            if line["case"] and key_of(line["step"], line["case"]) == key and not line.get("error"):
                found = line["figures"]
        return found
