"""A sheet shows every picture, and bars as long as their shares."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trainer.contact_sheet import BAR, FRAME, GAP, LINE, MAX_COLUMNS, SIDE, TEXT, Tile, draw_sheet

RED = (250, 0, 0)


def sheet_of(*tiles):
    return np.asarray(draw_sheet(tiles))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 64), (300, 300), (640, 640)])
def test_a_square_fills_its_place(size):
    pixels = sheet_of(Tile(image=Image.new("RGB", size, RED), title="a"))
    assert (pixels[GAP : GAP + SIDE, GAP : GAP + SIDE] == RED).all()


@pytest.mark.parametrize(("size", "shown"), [((400, 200), (104, 208)), ((200, 400), (208, 104)), ((900, 1), (1, 208))])
def test_the_aspect_is_kept(size, shown):
    is_red = (sheet_of(Tile(image=Image.new("RGB", size, RED), title="a")) == RED).all(-1)
    assert (is_red.any(1).sum(), is_red.any(0).sum()) == shown


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_bar_is_as_long_as_its_share(share):
    pixels = sheet_of(Tile(image=None, title="a", bars=[("cat", share)]))
    row = pixels[GAP + SIDE + LINE + 2, GAP : GAP + SIDE]  # above the text
    length = round(share * SIDE)
    assert (row[:length] == BAR).all()
    assert (row[length:] == FRAME).all()


def test_text_is_written_and_stays_in_its_tile():
    tile = Tile(image=None, title="long " * 40, bars=[("word " * 40, 0.5)], note="unreadable " * 200)
    pixels = sheet_of(tile)
    assert (pixels[GAP + SIDE + LINE : GAP + SIDE + 2 * LINE] == TEXT).all(-1).any()
    edge = np.concatenate([pixels[:, :GAP], pixels[:, -GAP:]], axis=1)
    assert (edge == 255).all()


def test_tiles_go_row_by_row():
    colours = [(index * 30, 10, 10) for index in range(7)]
    pixels = sheet_of(*(Tile(image=Image.new("RGB", (9, 9), colour), title="a") for colour in colours))
    assert pixels.shape[1] == GAP + MAX_COLUMNS * (SIDE + GAP)
    rows = [GAP + SIDE // 2, 2 * GAP + (SIDE + LINE + GAP) + SIDE // 2]
    shown = [
        tuple(pixels[rows[index // MAX_COLUMNS], GAP + (SIDE + GAP) * (index % MAX_COLUMNS) + SIDE // 2].tolist())
        for index in range(7)
    ]
    assert shown == colours
