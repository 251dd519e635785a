"""Labels of the points of a plot, each put where it covers no other label, point or line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

__all__ = ["place_labels"]

_SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (4, 8, 20, 30, 40)  # points
_LED = 20  # from this distance on, a line leads from the point to its label
_ROUNDS = 4


class _Place(NamedTuple):
    options: dict[str, Any]  # of Axes.annotate
    box: Bbox  # in pixels
    line: list[Bbox]  # pieces of the line that leads there, if there is one
    faults: float  # of the place, whatever the places of the other labels


def place_labels(axes: Axes, labels: Sequence[tuple[str, float, float]], *, size: float) -> None:
    """Write labels next to their points, after everything else is drawn.

    Args:
        axes: With its limits, lines, points and legend.
        labels: Text, x and y of each.
        size: Of the font, in points.
    """
    cast(Figure, axes.figure).draw_without_rendering()  # settles the layout, and with it where points are
    points = axes.transData.transform([(x, y) for _, x, y in labels])
    obstacles = _obstacles(axes)
    places = [_places(axes, label, index, points, obstacles, size) for index, label in enumerate(labels)]
    chosen = [min(candidates, key=lambda place: place.faults) for candidates in places]
    for index in [*range(len(labels))] * _ROUNDS:
        others = [place.box for other, place in enumerate(chosen) if other != index]
        chosen[index] = min(places[index], key=lambda place: place.faults + 20 * _overlaps(place, others))
    for (text, x, y), place in zip(labels, chosen, strict=True):
        axes.annotate(text, (x, y), **place.options)


def _places(
    axes: Axes, label: tuple[str, float, float], own: int, points: np.ndarray, obstacles: list[Bbox], size: float
) -> list[_Place]:
    """Return where a label may go: on any side of its point, near or at the end of a line."""
    figure = cast(Figure, axes.figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    room = axes.get_window_extent(renderer)
    written = axes.annotate(label[0], label[1:], fontsize=size)
    extent = written.get_window_extent(renderer)
    written.remove()
    (left, bottom), pixels = points[own], figure.dpi / 72
    places = []
    for distance, (x, y) in product(_DISTANCES, _SIDES):
        corner = ((1 - x) / 2, (1 - y) / 2)  # of the label, towards the point
        x0 = left + distance * pixels * x - corner[0] * extent.width
        y0 = bottom + distance * pixels * y - corner[1] * extent.height
        box = Bbox.from_bounds(x0, y0, extent.width, extent.height)
        options = {
            "xytext": (distance * x, distance * y),
            "textcoords": "offset points",
            "ha": {-1: "right", 0: "center", 1: "left"}[x],
            "va": {-1: "top", 0: "center", 1: "bottom"}[y],
            "fontsize": size,
        }
        is_outside = box.x0 < room.x0 or box.x1 > room.x1 or box.y0 < room.y0 or box.y1 > room.y1
        place = _Place(options, box, [], 100 * is_outside + distance / 20)
        if distance >= _LED:
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": mpl.rcParams["text.color"], "relpos": corner}
            options["arrowprops"] = {**line, "shrinkA": 0, "shrinkB": 2}
            end = (x0 + corner[0] * extent.width, y0 + corner[1] * extent.height)
            place = place._replace(line=_pieces(points[own], end, pad=1)[2:])
        else:
            distances = [_distance(box, *point) for point in points]
            num_nearer = sum(distance < distances[own] + 2 for distance in distances) - 1
            place = place._replace(faults=place.faults + 20 * num_nearer)  # whose label is it?
        places.append(place._replace(faults=place.faults + 2 * _overlaps(place, obstacles)))
    return places


def _overlaps(place: _Place, boxes: Sequence[Bbox]) -> int:
    return sum(part.count_overlaps(boxes) for part in (place.box, *place.line))


def _pieces(start: Sequence[float], end: Sequence[float], *, pad: float = 3) -> list[Bbox]:
    """Return a line as small boxes, in pixels."""
    steps = max(2, int(np.hypot(end[0] - start[0], end[1] - start[1]) / 4))
    return [Bbox.from_extents(x - pad, y - pad, x + pad, y + pad) for x, y in np.linspace(start, end, steps)]


def _distance(box: Bbox, x: float, y: float) -> float:
    """Return how far a point is from a box, in pixels."""
    return float(np.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)))


def _obstacles(axes: Axes) -> list[Bbox]:
    """Return the legend, the points, and the lines in pieces, in pixels."""
    boxes = []
    for group in axes.collections:
        boxes += [_pieces(point, point)[0] for point in axes.transData.transform(group.get_offsets())]
    for line in axes.get_lines():
        for start, end in pairwise(axes.transData.transform(line.get_xydata())):
            boxes += _pieces(start, end)
    legend = axes.get_legend()
    return boxes if legend is None else [*boxes, legend.get_window_extent()]
