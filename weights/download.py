"""Download released checkpoints: ``python -m weights.download mobilemamba_t2 maskrcnn``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence

from model.command import exit_code
from model.zoo import Entry, fetch, local_path, models_of, read_zoo
from util.errors import EXIT_USER_ERROR
from util.logging import setup_console, table

__all__ = ["add_zoo_options", "main"]

logger = logging.getLogger(__name__)

EPILOG = """\
examples:
  python -m weights.download mobilemamba_t2 mobilemamba_b1s
  python -m weights.download imagenet --from https://mirror.example/mobilemamba/
  python -m weights.download all --from /shared/checkpoints
  python -m weights.download --list

Interrupted downloads resume. Each file is verified, and its size and SHA-256 are recorded next to it.
"""


def add_zoo_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command on checkpoints has."""
    parser.add_argument(
        "--from",
        dest="source",
        default="",
        metavar="PLACE",
        help="where to get what is not there: a mirror's address or a folder, laid out as weights/ or flat, or the "
        "address or path of the file itself (default: the original source)",
    )
    parser.add_argument("--zoo", metavar="FILE", help="a list of checkpoints of your own, as model/zoo/zoo.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Download what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m weights.download",
        description="Download released checkpoints into weights/ and verify them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a checkpoint, or: imagenet, det, seg, all")
    parser.add_argument("--list", action="store_true", help="list the checkpoints, and which of them are here")
    add_zoo_options(parser)
    parsed = parser.parse_args(arguments)
    if not parsed.names and not parsed.list:
        parser.error("name a checkpoint, or: imagenet, det, seg, all; --list shows them")
    setup_console(is_logging=True)
    return exit_code(lambda: _run(parsed), interrupted="interrupted; the same command resumes")


def _run(parsed: argparse.Namespace) -> int:
    models = read_zoo(parsed.zoo) if parsed.zoo else read_zoo()
    chosen = models_of(parsed.names, models)
    failed = [entry.name for entry in chosen if not _get(entry, parsed.source)]
    if parsed.list:
        print(_listing(models))
    if failed:
        logger.error("%d of %d are missing: %s", len(failed), len(chosen), ", ".join(failed))
        return EXIT_USER_ERROR
    return 0


def _get(entry: Entry, source: str) -> bool:
    """Fetch one checkpoint; a failure is logged, and does not stop the others."""
    is_here = local_path(entry).exists()
    try:
        file = fetch(entry, source=source)
    except (ValueError, OSError) as error:
        logger.error("%s: %s", entry.name, error)
        return False
    logger.info("%s: %s, verified%s", entry.name, file, " (was here already)" if is_here else "")
    return True


def _listing(models: Mapping[str, Entry]) -> str:
    rows = []
    for entry in models.values():
        figures = ", ".join(f"{name} {value:g}" for name, value in list(entry.published.items())[:2])
        rows.append([entry.name, entry.network, entry.params, figures, "here" if local_path(entry).exists() else "-"])
    return table(["name", "network", "params", "published", "file"], rows)


if __name__ == "__main__":
    sys.exit(main())
