"""Counts a model's parameters, and its multiply-accumulates on one image, which the tables call FLOPs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .arguments import add_options
from .errors import exit_code_of
from .inference import build_network
from .settings import load_config

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both; the exit code is 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description="Count a model's parameters and its operations on one image.")
    parser.add_argument("config", help="a config file, with or without .py")
    parser.add_argument("--shape", type=int, nargs="+", default=(512, 512), metavar="PIXELS", help="side, or height and width (512)")
    add_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_code_of(lambda: _count(parsed))
