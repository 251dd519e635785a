"""Write the page of a run again, or one that compares several: ``python -m trainer.report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.command import exit_code

from .page import page_path, write_page

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description="Write the page of one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output", type=Path, help="file to write; report.html in the run's folder, or here for several runs"
    )
    options = parser.parse_args(arguments)
    path = options.output or page_path(options.runs[0] if len(options.runs) == 1 else Path())

    def run() -> None:
        write_page(path, options.runs)
        sys.stdout.write(f"{path}\n")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
