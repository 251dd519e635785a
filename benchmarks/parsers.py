"""The beginning of every script's command line."""

from __future__ import annotations

import argparse

__all__ = ["new_parser"]


def new_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows a script's docstring line by line.

    Args:
        script: Name of its module in this package.
        description: Its docstring.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {__package__}.{script}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
