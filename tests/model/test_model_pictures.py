"""Folders of pictures, as the commands read them, beside what the data loaders make of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data import Pictures
from model.pictures import find_pictures, read_picture


@pytest.fixture
def folder(tmp_path):
    """Pictures of several kinds, one of them in a subfolder, among files that are none or hidden."""
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    deep = values[..., 0].astype(np.uint16) * 257
    colours, transparent = Image.fromarray(values[..., :3]), Image.fromarray(values)
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "folder.png").mkdir()
    pictures = {"deep.tif": Image.fromarray(deep), "a.ppm": colours, "b.GIF": transparent, "sub/c.jfif": colours}
    for name, picture in pictures.items():
        picture.save(tmp_path / name, "JPEG" if name.endswith("jfif") else None)
    for name in (".hidden/d.png", ".e.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"none")
    return tmp_path


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_commands_read_what_the_loaders_read(folder, mode):
    loaded = Pictures(str(folder), mode=mode)
    names = [str(path.relative_to(folder)) for path in find_pictures(folder)]
    assert sorted(names) == sorted(loaded.name(index).removeprefix(f"{folder}/") for index in range(len(loaded)))
    assert len(names) == 4
    for index in range(len(loaded)):
        picture = read_picture(folder / loaded.name(index), mode)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(loaded.load(index)[0]))


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "a.bmp").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"a\.bmp cannot be read \(not an image.*\): leave it out"):
        read_picture(*find_pictures(tmp_path))
