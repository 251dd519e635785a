"""Drawn scenes with exact truth: filled shapes on a noisy ground, each with its own colour and outline.

Coordinates are continuous pixels, x to the right, y down; a pixel belongs to a shape where its centre is inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "Scene", "Shape", "draw_scene"]

# Outlines around the origin, within a radius of 1, and colours that keep apart when jittered.
_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
OUTLINES = (
    np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1),  # disk
    np.array([(-1, -0.7), (1, -0.7), (1, 0.7), (-1, 0.7)]),  # rectangle
    np.array([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)]),  # rhombus
    np.array([(-0.9, 0.9), (0, -1), (0.9, 0.9)]),  # triangle
)
COLOURS = np.array([(230, 60, 50), (60, 90, 230), (240, 210, 50), (60, 190, 80)], dtype=np.float64)
KINDS = len(OUTLINES)

SMALLEST, LARGEST = 0.14, 0.26  # radius, as a share of the image's shorter side
MAX_SHAPES = 4
TRIALS = 20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One drawn shape.

    Attributes:
        kind: 0..KINDS-1.
        polygon: Its outline, (V, 2) x and y.
        mask: The pixels it covers, (H, W).
    """

    kind: int
    polygon: NDArray[np.float64]
    mask: NDArray[np.bool_]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The pixels' bounds: left, top, width, height."""
        (rows,), (columns,) = np.nonzero(self.mask.any(axis=1)), np.nonzero(self.mask.any(axis=0))
        return int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image and what is on it; shapes do not overlap.

    Attributes:
        image: (H, W, 3), RGB.
        shapes: One to four.
        blank: A corner that is painted over, and belongs to nothing; (H, W).
    """

    image: NDArray[np.uint8]
    shapes: tuple[Shape, ...]
    blank: NDArray[np.bool_]


def draw_scene(height: int, width: int, *, seed: tuple[int, ...]) -> Scene:
    """Draw a scene, always the same for the same size and seed.

    Args:
        height: Pixels.
        width: Pixels.
        seed: Numbers that tell scenes apart.
    """
    random = np.random.default_rng(seed)
    image = random.uniform(90, 150, 3) + random.normal(0, 12, (height, width, 3))
    blank = np.zeros((height, width), dtype=bool)
    blank[: max(height // 12, 1), : max(width // 12, 1)] = True
    image[blank] = 0
    shapes = tuple(_shapes(random, height, width, taken=blank.copy()))
    for shape in shapes:
        colour = COLOURS[shape.kind] + random.normal(0, 12, 3)
        image[shape.mask] = colour + random.normal(0, 6, (int(shape.mask.sum()), 3))
    return Scene(image=np.clip(np.rint(image), 0, 255).astype(np.uint8), shapes=shapes, blank=blank)


def _shapes(random: np.random.Generator, height: int, width: int, *, taken: NDArray[np.bool_]) -> Iterator[Shape]:
    wanted = int(random.integers(1, MAX_SHAPES + 1))
    for _ in range(TRIALS):
        shape = _random_shape(random, height, width)
        if not (shape.mask & taken).any():
            taken |= shape.mask
            wanted -= 1
            yield shape
        if wanted == 0:
            return


def _random_shape(random: np.random.Generator, height: int, width: int) -> Shape:
    kind = int(random.integers(KINDS))
    radius = random.uniform(SMALLEST, LARGEST) * min(height, width)
    centre = random.uniform((radius, radius), (width - radius, height - radius))
    polygon = centre + radius * OUTLINES[kind]
    return Shape(kind=kind, polygon=polygon, mask=_inside(polygon, height, width))


def _inside(polygon: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Return which pixel centres a polygon holds, by the number of edges to the right of each."""
    x, y = np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None]
    inside = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside
