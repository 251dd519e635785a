"""Draws the figure of the network, docs/network.svg: stages, block, downsampling and mixer, from top to bottom.

``python docs/draw_network.py`` writes it again. The figure needs no library and follows the reader's light or dark
mode: every element carries its light colours, and a style sheet replaces them by class where the page is dark.
"""

# ruff: noqa: RUF001 - the signs of multiplication are meant

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from typing import NamedTuple

__all__ = ["STAGES", "draw"]

WIDTH, HEIGHT = 800, 702
MARGIN = 16


class Stage(NamedTuple):
    """One of the three stages, as all variants share it."""

    stride: int  # pixels of the image for each of the map
    kernel: int  # side of the mixer's kernels
    global_ratio: float  # share of the channels that WTE-Mamba mixes
    local_ratio: float  # share that MK-DeConv mixes; the rest passes unchanged


STAGES = (Stage(16, 7, 0.8, 0.2), Stage(32, 5, 0.7, 0.2), Stage(64, 3, 0.6, 0.3))


class Paint(NamedTuple):
    """Fill and stroke, in light and in dark mode."""

    fill: str
    stroke: str
    dark_fill: str
    dark_stroke: str


PAINTS = {
    "paper": Paint("#ffffff", "none", "#0d1117", "none"),
    "ink": Paint("#1f2328", "none", "#e6edf3", "none"),
    "faint": Paint("#59636e", "none", "#9198a1", "none"),
    "line": Paint("none", "#59636e", "none", "#9198a1"),
    "tip": Paint("#59636e", "none", "#9198a1", "none"),
    "room": Paint("#f6f8fa", "#d1d9e0", "#151b23", "#3d444d"),
    "plain": Paint("#ffffff", "#818b98", "#212830", "#656c76"),
    "stage": Paint("#ddf4ff", "#54aeff", "#0c2d6b", "#388bfd"),
    "global": Paint("#fbefff", "#bf8aff", "#3c1e70", "#986ee2"),
    "local": Paint("#fff1e5", "#f0883e", "#5a1e02", "#db6d28"),
    "same": Paint("#eaeef2", "#818b98", "#2f3742", "#656c76"),
}


class Drawing:
    """Collects the elements of an SVG file; lengths are pixels, y grows downwards."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def add(self, tag: str, paint: str, content: str = "", **attributes: object) -> None:
        """Add an element in one of the `PAINTS`."""
        colors = PAINTS[paint]
        attributes |= {"class": paint, "fill": colors.fill, "stroke": colors.stroke}
        given = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.elements.append(f"<{tag} {given}>{escape(content)}</{tag}>" if content else f"<{tag} {given}/>")

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        size: float = 12,
        bold: bool = False,
        at: str = "middle",
        paint: str = "",
        **attributes: object,
    ) -> None:
        """Write a line of text whose baseline is y; small text is fainter."""
        paint = paint or ("ink" if bold or size >= 12 else "faint")
        style = {"font_size": size, "font_weight": 600 if bold else 400, "text_anchor": at}
        if content:
            self.add("text", paint, content, x=f"{x:g}", y=f"{y:g}", **style, **attributes)

    def room(self, y: float, height: float, title: str, note: str) -> None:
        """Frame one of the figure's parts, with a title and a note."""
        self.add("rect", "room", x=MARGIN / 2, y=y, width=WIDTH - MARGIN, height=height, rx=8)
        self.text(MARGIN + 4, y + 22, title, size=14, bold=True, at="start")
        self.text(MARGIN + 14 + 8.6 * len(title), y + 22, note, size=11.5, at="start")

    def box(self, x: float, y: float, width: float, height: float, *lines: str, paint: str = "plain") -> None:
        """Draw a box around a bold line and lighter ones below it. (x, y) is its upper left corner."""
        self.add("rect", paint, x=f"{x:g}", y=f"{y:g}", width=width, height=f"{height:g}", rx=5)
        top = y + height / 2 - 7 * (len(lines) - 1) + 4.5
        for index, line in enumerate(lines):
            is_first = index == 0
            self.text(x + width / 2, top + 14.5 * index, line, size=12.5 if is_first else 11, bold=is_first)

    def path(self, *points: tuple[float, float], tip: bool = True) -> None:
        """Draw a line of straight pieces, with a tip at its end."""
        steps = " ".join(f"{'M' if index == 0 else 'L'}{x:g} {y:g}" for index, (x, y) in enumerate(points))
        self.add("path", "line", d=steps, stroke_width=1.4, stroke_linejoin="round")
        if tip:
            (x0, y0), (x1, y1) = points[-2:]
            dx, dy = ((x1 > x0) - (x1 < x0)) * 6, ((y1 > y0) - (y1 < y0)) * 6
            sides = f"{x1 - dx - dy / 1.7:g},{y1 - dy - dx / 1.7:g} {x1 - dx + dy / 1.7:g},{y1 - dy + dx / 1.7:g}"
            self.add("polygon", "tip", points=f"{x1:g},{y1:g} {sides}")

    def plus(self, x: float, y: float) -> None:
        """Draw the sign of an addition around (x, y)."""
        self.add("circle", "plain", cx=x, cy=y, r=9)
        self.path((x - 5, y), (x + 5, y), tip=False)
        self.path((x, y - 5), (x, y + 5), tip=False)

    def svg(self) -> str:
        """Return the file's text."""
        dark = "\n".join(f".{name} {{fill: {p.dark_fill}; stroke: {p.dark_stroke}}}" for name, p in PAINTS.items())
        font = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
                f'height="{HEIGHT}" font-family="{font}" role="img">',
                "<title>MobileMamba: stages, block, downsampling and mixer</title>",
                f"<style>\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n</style>",
                *self.elements,
                "</svg>\n",
            ]
        )


def draw() -> str:
    """Return the figure as the text of an SVG file."""
    drawing = Drawing()
    drawing.add("rect", "paper", x=0, y=0, width=WIDTH, height=HEIGHT)
    _network(drawing, 8)
    _block(drawing, 130)
    _downsampling(drawing, 260)
    _mixer(drawing, 360)
    return drawing.svg()


def _network(drawing: Drawing, y: float) -> None:
    """The way from the image to the logits."""
    drawing.room(y, 114, "MobileMamba", "three stages, at strides 16, 32 and 64")
    stages = [(f"Stage {index}", "blocks") for index in range(1, len(STAGES) + 1)]
    merge = ("Downsample", "stride 2")
    parts = [
        ("Image",),
        ("Stem", "4 × conv 3×3, ↓2"),
        stages[0],
        merge,
        stages[1],
        merge,
        stages[2],
        ("Head", "pool, linear"),
    ]
    widths = (52, 108, 74, 92, 74, 92, 74, 80)
    strides = {name: f"1/{stage.stride}" for (name, _), stage in zip(stages, STAGES, strict=True)}
    gap = (WIDTH - 2 * MARGIN - sum(widths)) / (len(parts) - 1)
    middle, height, x = y + 61, 44, float(MARGIN)
    for index, (lines, width) in enumerate(zip(parts, widths, strict=True)):
        if index:
            drawing.path((x - gap, middle), (x, middle))
        drawing.box(x, middle - height / 2, width, height, *lines, paint="stage" if lines[0] in strides else "plain")
        drawing.text(x + width / 2, middle + height / 2 + 17, strides.get(lines[0], ""), size=11.5)
        x += width + gap


def _block(drawing: Drawing, y: float) -> None:
    """Five residual layers within a residual."""
    drawing.room(y, 122, "Block", "dw: depthwise convolution; FFN: conv 1×1, ReLU, conv 1×1; batch norms are not drawn")
    middle, unit, first = y + 72, 136, 50
    for index, name in enumerate(("dw 3×3", "FFN", "Mixer", "dw 3×3", "FFN")):
        x = first + unit * index
        plus = x + 102
        drawing.path((x - 18, middle), (x, middle))
        drawing.box(x, middle - 17, 78, 34, name, paint="global" if name == "Mixer" else "plain")
        drawing.path((x + 78, middle), (plus - 9, middle))
        drawing.path((x - 12, middle), (x - 12, middle - 30), (plus, middle - 30), (plus, middle - 9))
        drawing.plus(plus, middle)
        drawing.path((plus + 9, middle), (plus + 16, middle), tip=False)
    end = first + unit * 5 + 5
    drawing.path((end - 25, middle), (end - 9, middle))
    drawing.path((first - 30, middle), (first - 12, middle), tip=False)
    drawing.path((first - 18, middle), (first - 18, middle + 32), (end, middle + 32), (end, middle + 9))
    drawing.plus(end, middle)
    drawing.path((end + 9, middle), (end + 34, middle))


def _downsampling(drawing: Drawing, y: float) -> None:
    """The inverted bottleneck between two stages."""
    drawing.room(y, 92, "Downsample", "residual dw 3×3 and FFN; PatchMerging, drawn here; residual dw 3×3 and FFN")
    parts = {
        "conv 1×1, C → 4C": 130,
        "ReLU": 62,
        "dw 3×3, ↓2": 110,
        "ReLU ": 62,
        "squeeze-excite": 118,
        "conv 1×1, 4C → C′": 138,
    }
    middle, x, gap = y + 60, 38.0, 21
    drawing.path((x - gap, middle), (x, middle))
    for name, width in parts.items():
        drawing.box(x, middle - 17, width, 34, name.strip())
        drawing.path((x + width, middle), (x + width + gap, middle))
        x += width + gap


def _mixer(drawing: Drawing, y: float) -> None:
    """Channels split over three branches, and the shares by stage."""
    drawing.room(y, 334, "Mixer", "the channels are split over three branches")
    top, bottom, joined = y + 38, y + 246, 612
    rows = {"global": (top, top + 124), "local": (top + 124, top + 172), "same": (top + 172, bottom)}
    for paint, (start, end) in rows.items():
        drawing.add("rect", paint, x=24, y=start, width=18, height=end - start)
    _wte_mamba(drawing, top, joined)
    _mk_deconv(drawing, top + 148, joined)
    drawing.text(96, top + 184, "Identity", bold=True, at="start")
    drawing.path((42, top + 190), (joined, top + 190))

    middle = (top + bottom) / 2
    drawing.box(joined, top, 30, bottom - top)
    drawing.text(
        0, 0, "concatenate", size=12.5, bold=True, transform=f"translate({joined + 19} {middle:g}) rotate(-90)"
    )
    drawing.path((joined + 30, middle), (joined + 50, middle))
    drawing.box(joined + 50, middle - 17, 108, 34, "ReLU, conv 1×1")
    drawing.path((joined + 158, middle), (joined + 175, middle))
    _shares(drawing, y + 260)


def _wte_mamba(drawing: Drawing, top: float, joined: float) -> None:
    """The scan next to a depthwise convolution in the wavelet domain, each scaled by learnt numbers, then added."""
    drawing.add("rect", "global", x=82, y=top, width=500, height=116, rx=6, fill_opacity=0.45)
    drawing.text(96, top + 104, "WTE-Mamba", bold=True, at="start")
    fork, plus = 100, 556
    middle, scan, bands = top + 56, top + 30, top + 84
    drawing.path((42, middle), (fork, middle), tip=False)
    drawing.path((fork, middle), (fork, scan), (188, scan))
    drawing.box(188, scan - 19, 322, 38, "SS2D", "selective scan, forward and backward, × scale", paint="global")
    drawing.path((510, scan), (plus, scan), (plus, middle - 9))
    drawing.path((fork, middle), (fork, bands - 6), (188, bands - 6))
    parts = ((188, 82, ("DWT", "Haar, ↓2")), (290, 118, ("dw k×k", "4 bands, × scale")), (428, 82, ("IDWT", "↑2")))
    for x, width, lines in parts:
        drawing.box(x, bands - 25, width, 38, *lines, paint="global")
        if x != parts[-1][0]:
            drawing.path((x + width, bands - 6), (x + width + 20, bands - 6))
    drawing.path((510, bands - 6), (plus, bands - 6), (plus, middle + 9))
    drawing.plus(plus, middle)
    drawing.path((plus + 9, middle), (joined, middle))


def _mk_deconv(drawing: Drawing, middle: float, joined: float) -> None:
    """Two depthwise convolutions."""
    drawing.text(96, middle - 6, "MK-DeConv", bold=True, at="start")
    drawing.path((42, middle), (188, middle))
    for x, width, name, end in ((188, 82, "dw k×k", 290), (290, 118, "ReLU", 428), (428, 82, "dw 1×1", joined)):
        drawing.box(x, middle - 16, width, 32, name, paint="local")
        drawing.path((x + width, middle), (end, middle))


def _shares(drawing: Drawing, y: float) -> None:
    """One bar a stage: the shares of the branches, and k."""
    for index, stage in enumerate(STAGES, start=1):
        left = 24.0 + (index - 1) * 256
        drawing.text(left, y + 12, f"Stage {index}: k = {stage.kernel}", at="start")
        shares = (stage.global_ratio, stage.local_ratio, 1 - stage.global_ratio - stage.local_ratio)
        for paint, share in zip(("global", "local", "same"), shares, strict=True):
            width = round(240 * share, 1)
            if width:
                drawing.add("rect", paint, x=f"{left:g}", y=y + 20, width=width, height=20)
                drawing.text(left + width / 2, y + 34, f"{share:.0%}", size=10.5, paint="ink")
            left += width
    note = "k: side of the mixer's kernels. Shares of the channels; WTE-Mamba's is rounded to a multiple of 16."
    drawing.text(24, y + 59, note, size=11, at="start")


def main() -> None:
    """Write the figure next to this file, or where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("network.svg"))
    path = parser.parse_args().out
    path.write_text(draw(), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
