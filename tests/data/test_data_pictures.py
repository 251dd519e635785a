"""Which images a file name, a folder or a glob stands for."""

from pathlib import Path

import pytest

from data import Pictures


@pytest.fixture
def album(tmp_path, encoded, pixels):
    for name in ("b.png", "a.JPEG", "deep/er/c.webp", "deep/d.png", ".hidden.png", "scan [1].png", "odd"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(len(name))))
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def names(place, album):
    pictures = Pictures(str(place))
    return [str(Path(pictures.name(index)).relative_to(album)) for index in range(len(pictures))]


def test_a_folder_holds_its_images_at_any_depth(album):
    assert names(album, album) == ["a.JPEG", "b.png", "scan [1].png", "deep/d.png", "deep/er/c.webp"]


@pytest.mark.parametrize("name", ["b.png", "odd", "scan [1].png", ".hidden.png"])
def test_a_file_is_taken_whatever_its_name(album, name, pixels):
    assert names(album / name, album) == [name]
    image, label = Pictures(str(album / name)).load(0)
    assert (image.size, label) == ((24, 24), 0)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.JPEG", "b.png", "scan [1].png"]),
        ("**/*.png", ["b.png", "deep/d.png", "scan [1].png"]),
        ("deep/*/?.webp", ["deep/er/c.webp"]),
        ("[ab].*", ["a.JPEG", "b.png"]),
    ],
)
def test_a_glob_takes_images_alone(album, pattern, expected):
    assert names(album / pattern, album) == expected


def test_relative_and_home_paths(album, monkeypatch):
    monkeypatch.chdir(album)
    monkeypatch.setenv("HOME", str(album))
    assert [Pictures(place).name(0) for place in ("b.png", "./deep", "*.png")] == ["b.png", "deep/d.png", "b.png"]
    assert Pictures("~/b.png").name(0) == str(album / "b.png")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("c.png", r"predict\.input=.*c\.png: there is no such file or folder; the nearest in .*: b\.png"),
        ("none/c.png", "there is no folder"),
        ("empty", r"no image in this folder and its subfolders \(1 other files\)"),
        ("*.txt", r"no image has such a name \(1 others have\)"),
        ("*.gif", r"\(0 others have\)"),
    ],
)
def test_nothing_found_is_said_with_the_way_out(album, place, message):
    (album / "empty").mkdir()
    (album / "empty" / "list.csv").write_text("")
    with pytest.raises(ValueError, match=message):
        Pictures(str(album / place))
