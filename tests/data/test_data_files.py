"""Links, unlistable folders, pipes and files that are not images: nothing is read twice or missed unseen."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import Pictures, build_loaders
from data.files import ImageSearch, read_file
from data.folders import DefaultCLS
from data.images import UnreadableImageError
from model.pictures import image_suffixes, missing_decoders

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pets(make_folders):
    return make_folders({"train": {"cat": 2, "dog": 1}, "val": {"cat": 1, "dog": 1}})


def link(place, target):
    place.symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize(
    "links",
    [
        {"cat/self": "."},
        {"cat/up": ".."},
        {"cat/up": "..", "dog/up": ".."},
        {"cat/root": "../.."},
        {"cat/dog": "../dog", "dog/cat": "../cat"},
    ],
    ids=lambda links: " ".join(links),
)
def test_links_in_a_circle_add_no_image_and_are_named(pets, links, caplog):
    expected = DefaultCLS(pets, split="train")
    for place, target in links.items():
        link(pets / "train" / place, target)
    dataset = DefaultCLS(pets, split="train")
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.fingerprint() == expected.fingerprint()
    assert f"{len(links)} links to folders that are read anyway" in caplog.text
    assert all(str(pets / "train" / place) in caplog.text for place in links)


def test_a_folder_elsewhere_is_read_once(pets, tmp_path, encoded, pixels, caplog):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.png").write_bytes(encoded(pixels(0)))
    for name in ("cat/first", "cat/second", "dog/third"):
        link(pets / "train" / name, tmp_path / "pool")
    assert DefaultCLS(pets, split="train").labels.tolist() == [0, 0, 0, 1]
    assert "cat/second" in caplog.text
    assert "dog/third" in caplog.text


def test_two_classes_in_one_folder_are_refused(pets):
    link(pets / "train" / "hound", "dog")
    with pytest.raises(ValueError, match="train: dog and hound are the same folder"):
        DefaultCLS(pets, split="train")


@pytest.mark.parametrize("pattern", ["", "**/*.png"])
def test_pictures_are_found_once(pets, pattern, caplog):
    link(pets / "train" / "cat" / "up", "..")
    link(pets / "train" / "dog" / "up", "../..")
    pictures = Pictures(str(pets / "train" / pattern))
    assert len({pictures.path(index).resolve() for index in range(len(pictures))}) == len(pictures) == 3
    assert "dog/up" in caplog.text


@pytest.mark.parametrize("folder", ["train/cat/deep", "train/cat", "train"])
def test_a_folder_that_cannot_be_listed_is_an_error(pets, make_config, monkeypatch, folder):
    (pets / "train" / "cat" / "deep").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path) == str(pets / folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=rf"{folder} cannot be listed \(Permission denied\)"):
        build_loaders(make_config(pets), rank=0, world_size=1)


@pytest.fixture
def pipe(pets):
    path = pets / "train" / "cat" / "pipe.png"
    os.mkfifo(path)
    return path


def test_a_pipe_is_refused_at_once(pipe):
    with pytest.raises(OSError, match="a pipe or device, not a regular file"):
        read_file(pipe)
    with pytest.raises(UnreadableImageError, match=r"pipe\.png: unreadable image \(a pipe or device"):
        DefaultCLS(pipe.parents[2], split="train").load(2)
    with pytest.raises(ValueError, match=r"predict\.input=.*pipe\.png: a pipe or device"):
        Pictures(str(pipe))


def test_a_device_is_refused(pipe):
    pipe.unlink()
    pipe.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="a pipe or device"):
        read_file(pipe)


def test_a_pipe_among_training_images_is_left_out_with_its_reason(pipe, make_config, caplog):
    loader = build_loaders(make_config(pipe.parents[2], batch_size=1), rank=0, world_size=1).train
    for epoch in range(2):
        names = [name for batch in loader.iterate(epoch) for name in batch.unreadable]
        assert set(names) == {str(pipe)}
    assert caplog.text.count("pipe.png: unreadable image (a pipe or device, not a regular file)") == 1


@pytest.fixture
def without_heif(monkeypatch):
    """HEIC cannot be decoded, whatever is installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pillow_heif" else find_spec(name))
    for cached in (missing_decoders, image_suffixes):
        cached.cache_clear()
    yield
    for cached in (missing_decoders, image_suffixes):
        cached.cache_clear()


def test_what_a_folder_of_pictures_leaves_out_is_counted_and_named(tmp_path, encoded, pixels, caplog, without_heif):
    for name, kind in (("a.jpg", "JPEG"), ("b.gif", "GIF"), ("d.jfif", "JPEG")):
        (tmp_path / name).write_bytes(encoded(pixels(0), kind))
    for name in ("IMG_1.HEIC", "IMG_2.heic", "notes.txt", "odd"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    with caplog.at_level("INFO"):
        assert len(Pictures(str(tmp_path))) == 3
    assert "4 stray files are ignored (2 .heic, 1 .txt, 1 without extension)" in caplog.text
    assert "IMG_1.HEIC; `pip install pillow-heif` makes HEIC readable" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"
    caplog.clear()
    with caplog.at_level("INFO"):
        assert len(Pictures(str(tmp_path / "[aI]*"))) == 1
    assert "2 stray files are ignored (2 .heic)" in caplog.text


def test_control_characters_in_names_are_escaped(tmp_path, caplog):
    (tmp_path / "evil\x1b[2J\n.txt").write_bytes(b"")
    with caplog.at_level("INFO"):
        search = ImageSearch(tmp_path)
        search.images()
        search.report()
    assert r"evil\x1b[2J\n.txt" in caplog.text
    assert "\x1b" not in caplog.text


READ_LISTS = """
import sys
from pathlib import Path
from data import DATASETS

for kind in ("DefaultCLS", "IN22KDataset"):
    dataset = DATASETS[kind](Path(sys.argv[1]), split="train", loader_type="pil")
    print(dataset.path(0).is_file(), len(dataset.read_bytes(0)))
"""


def test_lists_name_the_same_files_in_every_locale(tmp_path):
    (tmp_path / "grün 日.png").write_bytes(b"abc")
    (tmp_path / "train.txt").write_text("grün 日.png 0\n", encoding="utf-8")
    (tmp_path / "train.json").write_text('[["grün 日.png", 0]]', encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", READ_LISTS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["True 3", "True 3"], done.stderr


def test_the_configuration_limits_the_pixels(pets, make_config):
    loaders = build_loaders(make_config(pets, batch_size=1, max_pixels=24 * 24 - 1), rank=0, world_size=1)
    assert len([name for batch in loaders.test.iterate() for name in batch.unreadable]) == 2
    with pytest.raises(ValueError, match=r"cannot be read; .*\(24 x 24 pixels, more than data\.max_pixels=575\)"):
        next(loaders.train.iterate(0))
