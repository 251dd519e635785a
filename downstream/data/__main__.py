"""Checks and makes data sets: ``python -m downstream.data {check,make} {coco,ade20k} PATH``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.command import CommandError, exit_code

from .check import check_ade20k, check_coco
from .synthetic import write_ade20k, write_coco

__all__ = ["main"]

WRITERS = {"coco": write_coco, "ade20k": write_ade20k}
SOURCES = {
    "coco": "train2017.zip, val2017.zip and annotations_trainval2017.zip of cocodataset.org",
    "ade20k": "ADEChallengeData2016.zip of the ADE20K scene parsing benchmark, sceneparsing.csail.mit.edu",
}
LAYOUTS = """\
layouts:
  coco    PATH/annotations/instances_{train,val}2017.json, PATH/train2017/, PATH/val2017/
  ade20k  PATH/ADEChallengeData2016/{images,annotations}/{training,validation}/
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 where ``check`` finds something wrong, or 2 for bad input.
    """
    parsed = _parser().parse_args(arguments)

    def run() -> None:
        counts = parsed.command(parsed)
        print(f"{parsed.path}: {', '.join(f'{count:,} images in {split}' for split, count in counts.items())}")

    return exit_code(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m downstream.data",
        description="Check COCO and ADE20K folders, or make tiny ones of drawn shapes.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="say what is missing or wrong in a folder")
    check.set_defaults(command=_check)
    check.add_argument(
        "--any-size", action="store_true", help="accept other numbers of images than the published set's"
    )
    check.add_argument(
        "--classes",
        nargs="*",
        metavar="NAME",
        help="of coco: accept these categories and any number of images; without a name, any categories",
    )
    make = commands.add_parser("make", help="write a tiny data set, with all the real one's classes listed")
    make.set_defaults(command=_make)
    make.add_argument("--train", type=int, default=64, metavar="N", help="images to train on (64)")
    make.add_argument("--val", type=int, default=16, metavar="N", help="images to test on (16)")
    make.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("H", "W"), help="pixels (128 128)")
    make.add_argument("--seed", type=int, default=0, help="another seed draws other images (0)")
    for command in (check, make):
        command.add_argument("set", choices=sorted(WRITERS), help="which data set")
        command.add_argument("path", type=Path, help="its folder")
    return parser


def _check(parsed: argparse.Namespace) -> dict[str, int]:
    if parsed.classes is not None and parsed.set != "coco":
        raise ValueError(f"--classes is for coco: label maps of {parsed.set} hold numbers, not names")
    if parsed.set == "coco":
        counts, problems = check_coco(parsed.path, is_any_size=parsed.any_size, classes=parsed.classes)
    else:
        counts, problems = check_ade20k(parsed.path, is_any_size=parsed.any_size)
    if problems:
        title = f"{parsed.path} is not {parsed.set} as {SOURCES[parsed.set]} unpack to it:"
        if parsed.classes is not None:
            title = f"{parsed.path} is not a data set in the layout of {parsed.set}:"
        raise CommandError("\n  ".join([title, *problems]))
    return counts


def _make(parsed: argparse.Namespace) -> dict[str, int]:
    write = WRITERS[parsed.set]
    return write(parsed.path, num_train=parsed.train, num_val=parsed.val, size=tuple(parsed.size), seed=parsed.seed)


if __name__ == "__main__":
    sys.exit(main())
