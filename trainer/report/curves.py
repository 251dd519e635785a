"""Line charts as SVG, for a page that sets their colours: class ``sN`` is the colour of a line, ``dashed`` its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["NUM_COLOURS", "Line", "figure_of", "line_chart"]

# Lengths in units of the drawing, which are pixels where it is shown in its own size.
WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
MAX_DOTS = 30  # up to as many points, each is marked
NUM_COLOURS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        name: In the legend.
        points: Epochs, from 1, and values; a value that is not finite interrupts the line.
        colour: Index below `NUM_COLOURS`.
        is_dashed: How it is drawn.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool = False


def line_chart(title: str, lines: Sequence[Line], *, num_epochs: int) -> str:
    """Return a chart with its title and a legend that gives each line's last value; empty if there is no point.

    Args:
        title: What is shown, with its unit.
        lines: In the order of the legend.
        num_epochs: Length of the axis.
    """
    lines = [line for line in lines if any(math.isfinite(value) for _, value in line.points)]
    if not lines:
        return ""
    values = [value for line in lines for _, value in line.points if math.isfinite(value)]
    ticks = _ticks(min(values), max(values), count=4)
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    last = max(num_epochs, 2)

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (last - 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return round(x, 1), round(y, 1)

    parts = [_across(place(1, tick)[1], figure_of(tick)) for tick in ticks]
    parts += [_below(place(epoch, low)[0], epoch, is_last=epoch == last) for epoch in _epochs(last)]
    for line in lines:
        parts += _draw(line, place)
    legend = "".join(_entry(line) for line in lines)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by epoch">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def figure_of(value: float) -> str:
    """Return a number with as many digits as a reader wants: 0.00128, 78.43, 4,092."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1e3:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.4g}"


def _draw(line: Line, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """Return the pieces of a line between values that are not finite, and its points where these are few."""
    kind = _kind(line)
    pieces: list[list[tuple[float, float]]] = [[]]
    for epoch, value in line.points:
        if math.isfinite(value):
            pieces[-1].append(place(epoch, value))
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in filter(None, pieces):
        if len(piece) > 1:
            points = " ".join(f"{x:g},{y:g}" for x, y in piece)
            drawn.append(f'<polyline class="{kind}" points="{points}"/>')
        if len(piece) == 1 or len(line.points) <= MAX_DOTS:
            drawn += [f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="2"/>' for x, y in piece]
    return drawn


def _entry(line: Line) -> str:
    last = next(value for _, value in reversed(line.points) if math.isfinite(value))
    swatch = (
        f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true"><path class="{_kind(line)}" d="M0 4H20"/></svg>'
    )
    return f"<li>{swatch}{escape(line.name)} <b>{figure_of(last)}</b></li>"


def _kind(line: Line) -> str:
    return f"s{line.colour}{' dashed' if line.is_dashed else ''}"


def _across(y: float, label: str) -> str:
    text = f'<text x="{LEFT - 5}" y="{y + 3.5:g}" class="end">{label}</text>'
    return f'<path class="grid" d="M{LEFT} {y:g}H{WIDTH - RIGHT}"/>{text}'


def _below(x: float, epoch: int, *, is_last: bool) -> str:
    kind = "end" if is_last else "middle"
    return f'<text x="{x:g}" y="{HEIGHT - 7}" class="{kind}">{epoch}</text>'


def _epochs(last: int) -> list[int]:
    """Return whole epochs to name below a chart: the first, the last and round ones between that do not touch these."""
    step = max(1, int(_round_step(last / 5)))
    between = [epoch for epoch in range(step, last, step) if 1 + step / 2 < epoch <= last - 0.7 * step]
    return [1, *between, last]


def _ticks(low: float, high: float, *, count: int) -> list[float]:
    """Return round values, evenly spaced, that cover a range."""
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]


def _round_step(step: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is no less than ``step``."""
    unit = 10.0 ** math.floor(math.log10(step))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= step * (1 - 1e-9))
