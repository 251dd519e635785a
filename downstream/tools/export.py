"""Writes a detector or a segmentor as an ONNX file, and checks the file beside the model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from numpy.typing import NDArray
from PIL import Image

from downstream.data.shapes import draw_scene
from downstream.export.check import Agreement, compare_detections, compare_labels, predict
from downstream.export.graph import as_graph
from downstream.export.writing import load, write
from model.export.formats import require
from model.pictures import find_pictures, read_picture
from util.cores import count_cores, limit_threads

from .arguments import add_options
from .errors import InputError, exit_code_of
from .inference import build_network, class_names
from .settings import load_config, loader_datasets

__all__ = ["main"]

NUM_DRAWN = 3
MIN_SIDE, MAX_SIDE = 64, 2048  # pixels; the second with --dynamic-size
EXIT_DIFFERS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Export and check; the exit code is 0, 1 if the file's answers differ from the model's, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description="Write a detector or a segmentor as an ONNX file: an image as it is in (uint8, 1 x H x W x 3, "
        "RGB), boxes, scores, labels and masks, or the label of every pixel, out."
    )
    parser.add_argument("config", help="a config file, with or without .py")
    parser.add_argument("checkpoint", help="a checkpoint of training, or a released one")
    parser.add_argument("out", type=Path, help="the file, OUT.onnx")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="the image's side, or height and width; the test's own"
    )
    parser.add_argument(
        "--dynamic-size", action="store_true", help=f"take any height and width up to {MAX_SIDE} pixels"
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help=f"check with these pictures ({NUM_DRAWN} drawn ones)"
    )
    add_options(parser)
    parsed = parser.parse_args(arguments)
    agreements: list[Agreement] = []
    code = exit_code_of(lambda: agreements.extend(_export(parsed)))
    return code or (0 if all(agreement.agrees for agreement in agreements) else EXIT_DIFFERS)


def _export(parsed: argparse.Namespace) -> list[Agreement]:
    limit_threads(count_cores())
    try:
        require("onnx")
    except ImportError as error:
        raise InputError(str(error)) from error
    if parsed.out.suffix != ".onnx" or not parsed.out.parent.is_dir():
        raise InputError(f"{parsed.out}: give a name that ends in .onnx, in a folder that exists")
    config = load_config(parsed.config, parsed.cfg_options, data_root=parsed.data_root)
    size = _size(parsed.size) if parsed.size else _own_size(config)
    images = _read(parsed.images, size, parsed.dynamic_size) if parsed.images else _drawn(size, parsed.dynamic_size)
    model = build_network(config, checkpoint=parsed.checkpoint, device="cpu")
    start = time.perf_counter()
    print(f"{parsed.out}: writing {type(model).__name__} for images of {size[0]} x {size[1]} pixels", flush=True)
    largest = (MAX_SIDE, MAX_SIDE) if parsed.dynamic_size else size
    graph = as_graph(model, largest, is_exact=not parsed.dynamic_size)
    write(
        graph,
        parsed.out,
        size=size,
        is_dynamic=parsed.dynamic_size,
        metadata=_metadata(config, parsed.checkpoint, size),
    )
    megabytes = parsed.out.stat().st_size / 1e6
    print(f"{parsed.out}: {megabytes:.1f} MB, written in {time.perf_counter() - start:.0f} s", flush=True)
    return _check(parsed.out, model, images)


def _size(sides: Sequence[int]) -> tuple[int, int]:
    if len(sides) > 2 or min(sides) < MIN_SIDE or max(sides) > MAX_SIDE:
        given = " ".join(map(str, sides))
        raise InputError(f"--size {given}: give a side, or height and width, of {MIN_SIDE} to {MAX_SIDE} pixels")
    return sides[0], sides[-1]


def _own_size(config: Config) -> tuple[int, int]:
    """Return the size that a segmentor is trained at, or that a detector's test resizes to."""
    size = config.model.data_preprocessor.get("size")
    if size is not None:
        return size[0], size[1]
    _, dataset = next(loader_datasets(config, "test_dataloader"))
    for step in dataset["pipeline"]:
        if step["type"] == "Resize":
            width, height = step["scale"]
            return height, width
    raise InputError(f"{config.filename} does not say how large its images are: give --size")


def _drawn(size: tuple[int, int], is_dynamic: bool) -> list[tuple[str, NDArray[np.uint8]]]:
    """Return images by name; of other sizes too, odd ones among them, where any will do."""
    height, width = size
    sizes = [size, (width, height), (height * 3 // 4 + 1, width - 1)] if is_dynamic else [size] * NUM_DRAWN
    return [(f"drawn {h} x {w}", draw_scene(h, w, seed=(seed,)).image) for seed, (h, w) in enumerate(sizes)]


def _read(folder: Path, size: tuple[int, int], is_dynamic: bool) -> list[tuple[str, NDArray[np.uint8]]]:
    """Return pictures by name, at the size, or where any will do, as they are but no larger than it."""
    try:
        paths = find_pictures(folder)
    except FileNotFoundError as error:
        raise InputError(f"--images {folder}: {error}") from error
    return [(path.name, _resized(path, size, is_dynamic)) for path in paths]


def _resized(path: Path, size: tuple[int, int], is_dynamic: bool) -> NDArray[np.uint8]:
    picture = read_picture(path)
    height, width = size
    if is_dynamic:
        scale = min(height / picture.height, width / picture.width)
        width, height = max(round(scale * picture.width), MIN_SIDE), max(round(scale * picture.height), MIN_SIDE)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def _metadata(config: Config, checkpoint: str, size: tuple[int, int]) -> dict[str, Any]:
    classes = list(class_names(config, checkpoint) or ())
    return {"model": config.model.type, "size": size, "layout": "uint8 NHWC RGB", "classes": classes}


def _check(path: Path, model: Any, images: Sequence[tuple[str, NDArray[np.uint8]]]) -> list[Agreement]:
    run, compare = load(path), _comparison(model)
    agreements, times, own_times = [], [], []
    for name, image in images:
        found, seconds = _timed(run, image)
        expected, own_seconds = _timed(partial(predict, model), image)
        agreement = compare(found, expected)
        verdict = "agrees" if agreement.agrees else "DIFFERS"
        print(f"{name}: {verdict}, {agreement.summary}", flush=True)
        agreements.append(agreement)
        times.append(seconds)
        own_times.append(own_seconds)
    print(f"{path}: {min(times):.3f} s an image in ONNX Runtime, {min(own_times):.3f} s in PyTorch, at best")
    return agreements


def _timed(call: Callable[[NDArray[np.uint8]], dict[str, Any]], image: NDArray[np.uint8]) -> tuple[Any, float]:
    start = time.perf_counter()
    answer = call(image)
    return answer, time.perf_counter() - start


def _comparison(model: Any) -> Callable[..., Agreement]:
    if hasattr(model, "decode_head"):
        return compare_labels
    settings = (model.roi_head if hasattr(model, "roi_head") else model.bbox_head).test_cfg
    return partial(compare_detections, limit=settings.max_per_img, threshold=settings.score_thr)


if __name__ == "__main__":
    raise SystemExit(main())
