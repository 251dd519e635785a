"""A contact sheet: many pictures in one, each with its name and with bars for its most probable classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Tile", "draw_sheet"]

# Lengths in pixels.
SIDE = 208  # of the square that a picture is fitted into
GAP = 12
LINE = 20
FONT_SIZE = 13
MAX_COLUMNS, MAX_WIDE_COLUMNS = 5, 3
INNER_GAP = 4

BACKGROUND = (255, 255, 255)
FRAME = (236, 238, 241)
BAR = (178, 208, 245)
TEXT = (28, 30, 34)
FAINT = (110, 116, 125)
ALERT = (176, 32, 36)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

MAX_PIXEL_ART = 64  # up to this side, a picture is enlarged by whole pixels rather than smoothed


@dataclass(kw_only=True, slots=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        image: In RGB; None if it is missing.
        title: Above the bars.
        bars: Texts, each with the share (0 to 1) of the width that its bar takes.
        note: Text in place of a missing image.
        overlay: Beside the image, of the same size in the end; the sheet keeps room where any tile has one.
    """

    image: Image.Image | None
    title: str
    bars: list[tuple[str, float]] = field(default_factory=list)
    note: str = ""
    overlay: Image.Image | None = None


def draw_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """Return the tiles row by row, five a row, in RGB; three a row where there are overlays."""
    width = SIDE if all(tile.overlay is None for tile in tiles) else 2 * SIDE + INNER_GAP
    columns = min(MAX_COLUMNS if width == SIDE else MAX_WIDE_COLUMNS, max(len(tiles), 1))
    rows = -(-len(tiles) // columns)
    height = SIDE + LINE * (1 + max((len(tile.bars) for tile in tiles), default=0)) + GAP
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + max(rows, 1) * (height + GAP)), BACKGROUND)
    font = ImageFont.load_default(FONT_SIZE)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        _draw_tile(sheet, tile, GAP + column * (width + GAP), GAP + row * (height + GAP), font, width=width)
    return sheet


def _draw_tile(sheet: Image.Image, tile: Tile, left: int, top: int, font: Font, *, width: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for picture, start in ((tile.image, left), (tile.overlay, left + SIDE + INNER_GAP)):
        if start + SIDE <= left + width:
            draw.rectangle((start, top, start + SIDE - 1, top + SIDE - 1), fill=FRAME)
        if picture is not None:
            fitted = _fit(picture)
            sheet.paste(fitted, (start + (SIDE - fitted.width) // 2, top + (SIDE - fitted.height) // 2))
    if tile.image is None:
        _draw_note(draw, tile.note, left, top, font)
    top += SIDE
    draw.text((left, top + LINE // 2), _shorten(tile.title, width, font), fill=FAINT, font=font, anchor="lm")
    for text, share in tile.bars:
        top += LINE
        figure = f"{100 * share:.1f} %"
        room = width - int(font.getlength(figure)) - 14
        draw.rectangle((left, top + 1, left + width - 1, top + LINE - 2), fill=FRAME)
        if (length := round(share * width)) > 0:
            draw.rectangle((left, top + 1, left + length - 1, top + LINE - 2), fill=BAR)
        draw.text((left + 4, top + LINE // 2), _shorten(text, room, font), fill=TEXT, font=font, anchor="lm")
        draw.text((left + width - 4, top + LINE // 2), figure, fill=TEXT, font=font, anchor="rm")


def _draw_note(draw: ImageDraw.ImageDraw, note: str, left: int, top: int, font: Font) -> None:
    """Write a text of several lines into the place of a picture."""
    lines: list[str] = []
    for word in note.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= SIDE - 2 * GAP:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    for number, line in enumerate(lines[: SIDE // LINE - 1]):
        text = _shorten(line, SIDE - 2 * GAP, font)
        draw.text((left + GAP, top + GAP + LINE * number), text, fill=ALERT, font=font)


def _fit(image: Image.Image) -> Image.Image:
    """Return an image at the size at which its longer side fills its place."""
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    is_pixel_art = max(image.size) <= MAX_PIXEL_ART
    return image.resize(size, Image.Resampling.NEAREST if is_pixel_art else Image.Resampling.LANCZOS)


def _shorten(text: str, width: int, font: Font) -> str:
    """Return as much of a text as fits, with an ellipsis if it was cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
