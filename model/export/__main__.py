"""Export from the command line: ``python -m model.export CHECKPOINT_OR_NAME OUT --format FORMAT``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command import exit_code
from ..pictures import find_pictures
from ..preparation import INTERPOLATIONS
from .check import read_images
from .exporting import NUM_MADE_UP, default_request, export
from .formats import FORMATS, require
from .labels import labels_of
from .sources import read_source

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, and print how the file's answers compare with PyTorch's.

    Returns:
        0 where they agree, 1 where they do not, 2 where nothing could be written.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    require(options.format)
    source = read_source(options.source, name=options.model, ema=options.ema, is_random=options.random)
    request = default_request(source.network, **_request_options(options, source.classes))
    files = find_pictures(options.images) if options.images else []
    images = read_images(request, files, num_made_up=options.num_images)
    report = export(
        source.network,
        options.out,
        format=options.format,
        request=request,
        images=images,
        labels=labels_of(files, options.images, source.classes) if files else None,
        overwrite=options.overwrite,
    )
    sys.stdout.write(f"{options.out}: {report}\n")
    return 0 if report.agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="Export a network, and check the file."
    )
    add = parser.add_argument
    known = "default: as the checkpoint tells, or else as for ImageNet"
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
    add("--int8-report", type=Path, metavar="JSON", help="write each layer's signal to noise, and what stays in float")
    add("--max-drop", type=float, default=1.0, metavar="POINTS", help="top-1 that --int8 may cost; default: 1")
    add(
        "--preprocess", action="store_true", help="uint8 images of any size in: resize, crop and normalise in the graph"
    )
    add("--bgr", dest="is_bgr", action="store_true", help="their channels are blue, green, red")
    for name, text in (("mean", "mean of each channel"), ("std", "standard deviation of each channel")):
        add(f"--{name}", type=float, nargs="+", metavar="NUMBER", help=f"{text}, pixels being 0 to 1; {known}")
    add("--crop", dest="crop_pct", type=float, metavar="SHARE", help=f"of an image's shorter side; {known}")
    add("--interpolation", choices=INTERPOLATIONS, help=f"how images are resized; {known}")
    add("--softmax", action="store_true", help="probabilities out, in place of logits")
    add("--features", action="store_true", help="the maps of the three stages out, in place of logits")
    add("--overwrite", action="store_true", help="replace the file if it exists")
    add(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="pictures to compare with, best in a folder for each class; default: made up",
    )
    add("--num-images", type=int, default=NUM_MADE_UP, help=f"how many to make up; default: {NUM_MADE_UP}")
    return parser


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else int(text)


def _request_options(options: argparse.Namespace, classes: Sequence[str]) -> dict[str, Any]:
    names = (
        "batch",
        "dynamic_size",
        "fp16",
        "int8",
        "calibration",
        "int8_report",
        "max_drop",
        "preprocess",
        "is_bgr",
        "softmax",
        "features",
    )
    chosen = {name: getattr(options, name) for name in names}
    if options.size:
        chosen["size"] = (options.size[0], options.size[-1])
    for name in ("mean", "std", "crop_pct", "interpolation"):
        if (value := getattr(options, name)) is not None:
            chosen[name] = tuple(value) if isinstance(value, list) else value
    return {**chosen, "classes": tuple(classes)}


if __name__ == "__main__":
    sys.exit(main())
