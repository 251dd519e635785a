"""Export from the command line: ``python -m model.export CHECKPOINT_OR_NAME OUT --format FORMAT``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .check import read_images
from .exporting import NUM_MADE_UP, default_request, export
from .formats import FORMATS, require
from .sources import read_source

__all__ = ["main"]

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, and print how the file's answers compare with PyTorch's.

    Returns:
        0 where they agree, 1 where they do not, 2 where nothing could be written.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        require(options.format)
        source = read_source(options.source, name=options.model, ema=options.ema, is_random=options.random)
        request = default_request(source.network, **_wishes(options, source.classes))
        images = read_images(request, _pictures(options.images), num_made_up=options.num_images)
        report = export(
            source.network,
            options.out,
            format=options.format,
            request=request,
            images=images,
            overwrite=options.overwrite,
        )
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{options.out}: {report}\n")
    return 0 if report.agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="Export a network, and check the file."
    )
    add = parser.add_argument
    add("source", help="checkpoint, folder of save_pretrained, or name such as mobilemamba_t2 (downloads its weights)")
    add("out", type=Path, help="file to write")
    add("--format", "--to", choices=FORMATS, default="onnx", help="default: onnx")
    add("--model", default="", help="variant, where a checkpoint fits several")
    add("--ema", action="store_true", help="take the averaged weights, where there are both")
    add(
        "--random", action="store_true", help="leave a network that is named without trained weights, to try things out"
    )
    add("--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width; default: the network's own")
    add("--batch", type=_batch, default=1, help="images at once, or dynamic; default: 1")
    add("--dynamic-size", action="store_true", help="take any height and width")
    add("--fp16", action="store_true", help="weights in 16 bits")
    add("--int8", action="store_true", help="weights and maps in 8 bits; needs --calibrate")
    add("--calibrate", dest="calibration", type=Path, metavar="FOLDER", help="images from which --int8 learns ranges")
    add(
        "--preprocess", action="store_true", help="uint8 images of any size in: resize, crop and normalise in the graph"
    )
    add("--bgr", dest="is_bgr", action="store_true", help="their channels are blue, green, red")
    add("--softmax", action="store_true", help="probabilities out, in place of logits")
    add("--features", action="store_true", help="the maps of the three stages out, in place of logits")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add("--images", type=Path, metavar="FOLDER", help="pictures to compare with; default: made up")
    add("--num-images", type=int, default=NUM_MADE_UP, help=f"how many to make up; default: {NUM_MADE_UP}")
    return parser


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else int(text)


def _wishes(options: argparse.Namespace, classes: Sequence[str]) -> dict[str, Any]:
    names = (
        "batch",
        "dynamic_size",
        "fp16",
        "int8",
        "calibration",
        "preprocess",
        "is_bgr",
        "softmax",
        "features",
    )
    wishes = {name: getattr(options, name) for name in names}
    if options.size:
        wishes["size"] = (options.size[0], options.size[-1])
    return {**wishes, "classes": tuple(classes)}


def _pictures(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise FileNotFoundError(f"there are no pictures in {folder} ({', '.join(PICTURES)}): name another folder")
    return files


if __name__ == "__main__":
    sys.exit(main())
