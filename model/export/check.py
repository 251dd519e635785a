"""A written file beside PyTorch: the same images through both."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures import read_picture
from .deployed import Deployed
from .request import ExportRequest, Runner

__all__ = ["Report", "compare", "measure", "read_images", "size_on_disk"]

NUM_WARM_UP = 3
MEASURED_SECONDS = 1.0
MAX_ERROR = 1e-4  # of the largest value, in float32
MAX_ERROR_16 = 5e-2  # where weights or arithmetic have 16 bits
MIN_AGREEMENT_8 = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How a file's answers compare with PyTorch's.

    Attributes:
        num_bytes: Size of the file, or files.
        num_images: Images compared; 0 where the format's runtime does not exist for this system.
        error: The largest difference, as a share of the largest value.
        agreement: The share of images with the same most probable class; 1 for feature maps.
        images_per_second: In the file's own runtime, one image at a time.
        top1: Top-1 accuracy of the file, in percent; None where the images' classes are not known.
        top1_before: Top-1 accuracy of the network in PyTorch.
        agrees: Whether the differences are no larger than the requested precision explains.
    """

    num_bytes: int
    num_images: int = 0
    error: float = 0.0
    agreement: float = 1.0
    images_per_second: float = 0.0
    top1: float | None = None
    top1_before: float | None = None
    agrees: bool = True

    def __str__(self) -> str:
        megabytes = f"{self.num_bytes / 1e6:.1f} MB"
        if not self.num_images:
            return f"converted, not run: its runtime does not exist for this system; {megabytes}"
        verdict = "agrees with PyTorch" if self.agrees else "DOES NOT AGREE with PyTorch"
        known = "" if self.top1 is None else f" top-1 {self.top1:.2f}%, in PyTorch {self.top1_before:.2f}%;"
        return (
            f"{verdict}: largest error {self.error:.1e} of the largest value, the same first class for "
            f"{100 * self.agreement:.1f}% of {self.num_images} images;{known} {self.images_per_second:.1f} images/s at "
            f"batch 1; {megabytes}"
        )


def compare(
    run: Runner,
    network: Deployed,
    request: ExportRequest,
    images: Sequence[np.ndarray],
    *,
    num_bytes: int,
    labels: Sequence[int] | None = None,
) -> Report:
    """Run a file and the network it was made of on the same images.

    Args:
        run: What runs the file.
        network: The network as PyTorch has it, not in portable form.
        request: What was wanted.
        images: Single images, as the file takes them, with a batch dimension.
        num_bytes: Size of the file, for the report.
        labels: Classes of the images, where they are known.
    """
    batch = 1 if request.batch is None else request.batch
    difference, largest = 0.0, 0.0
    predicted: list[tuple[int, int]] = []  # most probable class in the runtime, and in PyTorch
    for image in images:
        expected = _run_network(network, image)
        actual = [output[:1] for output in run(np.repeat(image, batch, axis=0))]
        for output, exact in zip(actual, expected, strict=True):
            difference = max(difference, float(np.abs(output - exact).max(initial=0.0)))
            largest = max(largest, float(np.abs(exact).max(initial=0.0)))
        if not request.features:
            predicted.append((int(actual[0].argmax()), int(expected[0].argmax())))
    error = difference / max(largest, 1e-30)
    agreement = sum(found == exact for found, exact in predicted) / len(predicted) if predicted else 1.0
    top1, top1_before = _accuracies(predicted, labels) if predicted and labels is not None else (None, None)
    return Report(
        num_images=len(images),
        error=error,
        agreement=agreement,
        images_per_second=measure(run, np.repeat(images[0], batch, axis=0)) * batch,
        num_bytes=num_bytes,
        top1=top1,
        top1_before=top1_before,
        agrees=_is_near(error, agreement, request) and not _loses_too_much(top1, top1_before, request),
    )


def _run_network(network: Deployed, image: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        outputs = network(torch.from_numpy(image))
    return [output.numpy() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def _accuracies(predicted: Sequence[tuple[int, int]], labels: Sequence[int]) -> tuple[float, float]:
    """Return top-1 in percent, in the runtime and in PyTorch."""
    in_runtime, in_pytorch = (
        100 * sum(map(operator.eq, classes, labels)) / len(labels) for classes in zip(*predicted, strict=True)
    )
    return in_runtime, in_pytorch


def _loses_too_much(top1: float | None, top1_before: float | None, request: ExportRequest) -> bool:
    return top1 is not None and top1_before is not None and top1 < top1_before - request.max_drop


def _is_near(error: float, agreement: float, request: ExportRequest) -> bool:
    if not np.isfinite(error):
        return False
    if request.int8:
        return agreement >= MIN_AGREEMENT_8
    return error <= (MAX_ERROR_16 if request.fp16 else MAX_ERROR)


def measure(run: Runner, images: np.ndarray) -> float:
    """Return calls a second, by the fastest of a second's."""
    for _ in range(NUM_WARM_UP):
        run(images)
    times: list[float] = []
    while sum(times) < MEASURED_SECONDS:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return 1 / min(times)


def size_on_disk(paths: Sequence[Path]) -> int:
    """Return the bytes of files and folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.stat().st_size for file in files)


def read_images(request: ExportRequest, files: list[Path], *, num_made_up: int) -> list[np.ndarray]:
    """Return images as the exported file takes them, each with a batch dimension.

    Args:
        request: What is wanted.
        files: Pictures; where there are none, images are made up.
        num_made_up: How many.

    Raises:
        ValueError: If a picture cannot be read.
    """
    if not files:
        generator = np.random.default_rng(0)
        return [_made_up(request, generator) for _ in range(num_made_up)]
    return [_prepared(request, file) for file in files]


def _made_up(request: ExportRequest, generator: np.random.Generator) -> np.ndarray:
    shape = (1, *request.input_shape[1:])
    if request.preprocess:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return generator.standard_normal(shape, dtype=np.float32)


def _prepared(request: ExportRequest, file: Path) -> np.ndarray:
    """Return a picture as it is, or resized, cropped and normalised where the graph does not do so."""
    picture = read_picture(file, "L" if request.num_channels == 1 else "RGB")
    if request.preprocess:
        pixels = np.atleast_3d(np.asarray(picture))
        return np.ascontiguousarray(pixels[None, :, :, ::-1] if request.is_bgr else pixels[None])
    height, width = request.size
    scale = request.crop_pct * min(picture.height / height, picture.width / width)
    sides = scale * width, scale * height
    left, top = (picture.width - sides[0]) / 2, (picture.height - sides[1]) / 2
    box = (left, top, left + sides[0], top + sides[1])
    picture = picture.resize((width, height), Image.Resampling[request.interpolation.upper()], box=box)
    pixels = np.atleast_3d(np.asarray(picture)).astype(np.float32) / 255
    mean, std = (np.array(values, np.float32) for values in (request.mean, request.std))
    normalised = (pixels - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])
