"""Maps of contributions as pictures, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Panel", "colour", "draw_panels", "save_panels"]

# Lengths in pixels.
SIDE = 256
GAP = 16
LINE = 18
FONT_SIZE = 13

DECADES = 4.0  # of contribution below the largest that are told apart
PALETTE = 256  # colours of a PNG file
LEVELS = 32  # of colour: a map is noise to the eye, and a file of few colours is small
COLOURS = np.array([[255, 255, 255], [217, 240, 211], [127, 191, 123], [27, 120, 55], [0, 68, 27]])  # least to most
BACKGROUND, FRAME, TEXT, FAINT = (255, 255, 255), (209, 217, 224), (28, 30, 34), (89, 99, 110)


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One map.

    Attributes:
        title: Above it.
        lines: Below the title, in small.
        contribution: Of each pixel (H, W); none is negative.
    """

    title: str
    lines: Sequence[str]
    contribution: np.ndarray


def colour(contribution: np.ndarray) -> np.ndarray:
    """Return a map (H, W) in colours (H, W, 3), uint8: by its logarithm, white from 4 decades below the largest."""
    with np.errstate(divide="ignore"):
        level = np.log10(contribution / max(contribution.max(), np.finfo(float).tiny)) / DECADES + 1
    places = np.linspace(0, 1, len(COLOURS))
    channels = [
        np.interp(np.round(np.clip(level, 0, 1) * LEVELS) / LEVELS, places, COLOURS[:, channel]) for channel in range(3)
    ]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def draw_panels(panels: Sequence[Panel]) -> Image.Image:
    """Return the maps side by side, each 256 pixels wide, with its title and lines above it, in RGB."""
    head = LINE * (1 + max(len(panel.lines) for panel in panels)) + GAP // 2
    sheet = Image.new("RGB", (GAP + len(panels) * (SIDE + GAP), GAP + head + SIDE + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    title_font, font = ImageFont.load_default(FONT_SIZE + 1), ImageFont.load_default(FONT_SIZE - 1)
    for index, panel in enumerate(panels):
        left, top = GAP + index * (SIDE + GAP), GAP
        draw.text((left, top), _cut(panel.title, title_font), fill=TEXT, font=title_font)
        for number, line in enumerate(panel.lines, start=1):
            draw.text((left, top + number * LINE), _cut(line, font), fill=FAINT, font=font)
        picture = Image.fromarray(colour(panel.contribution)).resize((SIDE, SIDE), Image.Resampling.BOX)
        sheet.paste(picture, (left, top + head))
        draw.rectangle((left - 1, top + head - 1, left + SIDE, top + head + SIDE), outline=FRAME)
    return sheet


def save_panels(panels: Sequence[Panel], path: Path) -> None:
    """Write the maps side by side as a picture in the format that the file's name says; a PNG file has a palette."""
    sheet = draw_panels(panels)
    if path.suffix.lower() == ".png":
        sheet = sheet.quantize(PALETTE, dither=Image.Dither.NONE)
    sheet.save(path, optimize=True)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return as much of the beginning of a text as fits above a map."""
    while font.getlength(text) > SIDE:
        text = f"{text[:-2]}…" if text.endswith("…") else f"{text[:-1]}…"
    return text
