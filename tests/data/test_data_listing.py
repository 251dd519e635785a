"""The kept list of class folders: used while nothing changed, made again when something did."""

import os
from pathlib import Path

import pytest

from data import listing
from data.cache import Cache
from data.folders import DefaultCLS

OLD = 1_600_000_000  # seconds


@pytest.fixture
def folders(make_folders, monkeypatch):
    """Return class folders that were not changed lately, one of them nested."""
    monkeypatch.setattr(listing, "MIN_IMAGES", 1)
    root = make_folders({"train": {"ant": 2, "bee": 3, "bee/deep": 1}})
    (root / "train" / "bee" / "notes.txt").write_text("x")
    (root / "train" / "ant" / "again").symlink_to(root / "train")
    age(root)
    return root


def age(root):
    for folder in [root, *root.rglob("*/")]:
        os.utime(folder, (OLD, OLD))


@pytest.fixture
def cache(tmp_path):
    return Cache.create(str(tmp_path / "cache"))


@pytest.fixture
def searches(monkeypatch):
    """Return a list with an entry for each search from here on."""
    found = []
    monkeypatch.setattr("data.folders.Listing", lambda **fields: found.append(1) or listing.Listing(**fields))
    return found


def described(root, cache):
    dataset = DefaultCLS(root, split="train", cache=cache)
    names = [dataset.name(index) for index in range(len(dataset))]
    return names, dataset.labels.tolist(), dataset.class_names, dataset.fingerprint()


def test_an_unchanged_folder_is_searched_once(folders, cache, searches, caplog):
    expected = described(folders, None)
    caplog.clear()
    assert described(folders, cache) == expected
    said = caplog.messages
    assert any("links to folders" in message for message in said)
    caplog.clear()
    assert described(folders, cache) == expected
    assert caplog.messages == said
    assert len(searches) == 2


@pytest.mark.parametrize("change", ["add", "remove", "rename", "nested", "class", "replaced"])
def test_a_change_is_noticed(folders, cache, searches, change):
    described(folders, cache)
    train = folders / "train"
    image = next((train / "ant").glob("*.png"))
    match change:
        case "add":
            (train / "ant" / "new.png").write_bytes(b"x")
        case "remove":
            image.unlink()
        case "rename":
            image.rename(image.with_name("other.png"))
        case "nested":
            (train / "bee" / "deep" / "new.png").write_bytes(b"x")
        case "class":
            (train / "cat").mkdir()
            (train / "cat" / "new.png").write_bytes(b"x")
        case "replaced":
            (train / "bee").rename(folders / "gone")
            (train / "bee").mkdir()
            (train / "bee" / "other.png").write_bytes(b"x")
    assert described(folders, cache) == described(folders, None)
    assert len(searches) == 3


def test_a_folder_that_changed_just_now_is_not_kept(folders, cache, searches):
    (folders / "train" / "ant" / "new.png").write_bytes(b"x")
    for _ in range(2):
        described(folders, cache)
    assert len(searches) == 2
    assert not cache.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_list_is_made_again(folders, cache, searches, damage):
    expected = described(folders, cache)
    (file,) = cache.folder.rglob("*.safetensors")
    if damage == "other":
        listing.save_arrays(file, {}, {"format": "other"})
    else:
        file.write_bytes(file.read_bytes()[:-9] if damage == "cut" else b"no list")
    assert described(folders, cache) == expected
    assert described(folders, cache) == expected
    assert len(searches) == 2


def test_a_cache_that_cannot_be_written_changes_nothing(folders, tmp_path):
    (tmp_path / "file").write_text("x")
    assert described(folders, Cache.create(str(tmp_path / "file"))) == described(folders, None)


def test_small_folders_leave_no_file(make_folders, cache):
    root = make_folders({"train": {"ant": 2}})
    age(Path(root))
    described(root, cache)
    assert not cache.folder.exists()
