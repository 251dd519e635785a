"""The command lines, as users of OpenMMLab know them."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction

__all__ = ["add_options", "parse_run", "run_parser"]

LAUNCHERS = ("none", "pytorch", "slurm")


class _Options(DictAction):
    """Mmengine's KEY=VALUE pairs, and values that hold spaces, as paths may, or mappings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        pairs = [str(value).partition("=") for value in values or ()]
        for key, sign, _ in pairs:
            if not key or not sign:
                parser.error(f"{option_string}: {key!r} is not of the form KEY=VALUE")
        own: dict[str, Any] = {}
        for key, _, value in pairs:
            if "{" in value or "dict(" in value:
                own[key] = _literal(parser, f"{option_string} {key}", value)
            elif " " in value and value[0] not in "[(\"'":
                own[key] = value
        try:
            super().__call__(parser, namespace, ["=".join((key, value)) for key, _, value in pairs if key not in own])
        except AssertionError as error:
            parser.error(f"{option_string}: {error}")
        getattr(namespace, self.dest).update(own)


def _literal(parser: argparse.ArgumentParser, option: str, value: str) -> Any:
    """Return what holds mappings, such as a list of them, as Python writes it."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        parser.error(f"{option}: {value!r} cannot be read: write mappings as {{'type': 'LinearLR', 'end': 500}}")


def run_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with what training and testing share: the configuration, the work folder, the launcher."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a config file, with or without .py")
    parser.add_argument("--work-dir", metavar="DIR", help="where logs and checkpoints go (work_dirs/<config>)")
    add_options(parser)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="none", help="what started the processes")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every tool has: where the data lies, and overrides of the configuration."""
    parser.add_argument("--data-root", metavar="DIR", help="the data set's folder, for every loader and evaluator")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Options,
        default={},
        metavar="KEY=VALUE",
        help="override entries of the configuration: optim_wrapper.optimizer.lr=1e-4 model.backbone.frozen_stages=1",
    )


def parse_run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and tell mmengine the local rank where a launcher gave it as an argument."""
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", str(parsed.local_rank))
    return parsed
