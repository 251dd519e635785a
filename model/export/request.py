"""What to export: the file's input, output, precision and metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..preparation import INTERPOLATIONS
from ..version import __version__

__all__ = ["ExportRequest", "Runner"]

Runner = Callable[[np.ndarray], list[np.ndarray]]  # images as the file takes them -> each of its outputs
MIN_SIZE = 32
IN_GRAPH = ("bilinear", "bicubic")  # what runtimes compute with antialiasing, as Pillow does


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What a user asks for, whatever the format.

    Attributes:
        size: Height and width of the input in pixels; with ``dynamic_size`` the size at which the file is checked.
        batch: Images at once; None for any number.
        dynamic_size: Take any height and width from 32 pixels.
        fp16: Weights in 16 bits.
        int8: Weights and maps in 8 bits, where this costs little.
        calibration: A folder of images, from which int8 learns the ranges of the maps.
        int8_report: A JSON file to write each layer's signal to noise into.
        max_drop: How much int8 may cost, in points of top-1 on images whose classes are known.
        preprocess: Take uint8 images (B, H, W, C) of any size: resize, crop and normalise inside the graph.
        is_bgr: Those images have their channels in the order blue, green, red.
        softmax: Give probabilities in place of logits.
        features: Give the maps of the three stages in place of logits.
        classes: Names of the classes.
        mean: Mean of each channel, of pixels from 0 to 1.
        std: Standard deviation of each channel.
        crop_pct: The share of an image's shorter side that is kept, in its middle.
        interpolation: How the crop is resized, by Pillow's name for it.

    Raises:
        ValueError: If options contradict each other, or a size is too small.
    """

    size: tuple[int, int]
    batch: int | None = 1
    dynamic_size: bool = False
    fp16: bool = False
    int8: bool = False
    calibration: Path | None = None
    int8_report: Path | None = None
    max_drop: float = 1.0
    preprocess: bool = False
    is_bgr: bool = False
    softmax: bool = False
    features: bool = False
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if min(self.size) < MIN_SIZE:
            raise ValueError(f"size {self.size[0]}x{self.size[1]} is too small: both sides must be {MIN_SIZE} or more")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be 1 or more, or dynamic, got {self.batch}")
        if self.dynamic_size and self.preprocess:
            raise ValueError("--preprocess takes images of any size already: leave --dynamic-size out")
        if self.softmax and self.features:
            raise ValueError("--softmax is for logits, and --features gives none: choose one")
        if self.fp16 and self.int8:
            raise ValueError("--fp16 and --int8 exclude each other: choose one")
        if self.int8 and self.calibration is None:
            raise ValueError("--int8 learns the ranges of the maps from images: name a folder with --calibrate")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must have a number for each channel, std above 0")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop is the share of an image that is seen: above 0 and at most 1, not {self.crop_pct}")
        known = IN_GRAPH if self.preprocess else INTERPOLATIONS
        if self.interpolation not in known:
            where = " inside the graph" if self.preprocess else ""
            raise ValueError(
                f"images are not resized by {self.interpolation}{where}: choose --interpolation of {', '.join(known)}"
            )

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input to trace with: (B, C, H, W), or (B, H, W, C) where the graph preprocesses."""
        batch = 1 if self.batch is None else self.batch
        if self.preprocess:
            return batch, *self.size, self.num_channels
        return batch, self.num_channels, *self.size

    @property
    def input_name(self) -> str:
        """The name of the input."""
        return "images"

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs."""
        if self.features:
            return "stage1", "stage2", "stage3"
        return ("probabilities",) if self.softmax else ("logits",)

    def metadata(self) -> dict[str, str]:
        """Return the file's metadata; values other than strings are JSON."""
        facts: dict[str, Any] = {
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "layout": "uint8 NHWC" if self.preprocess else "float32 NCHW",
            "channels": "BGR" if self.is_bgr else "RGB",
        }
        if self.classes:
            facts["classes"] = self.classes
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        return {"producer": f"mobilemamba {__version__}", **texts}
