"""Every type of data set is read as it lies on the disk."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from configs.schema import Data
from configs.values import entry_types
from data import DATASETS
from data.base import BytesTable
from data.folders import DefaultCLS


def content(dataset):
    return [(np.asarray(image).tobytes(), label) for image, label in map(dataset.load, range(len(dataset)))]


def test_the_configuration_names_each_type():
    assert set(entry_types(Data)["type"].__args__) == set(DATASETS)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_class_folders_as_torchvision_reads_them(make_folders, image_format):
    root = make_folders({"train": {"b": 3, "a 1": 2, "b/nested": 1, "C": 12}}, image_format=image_format)
    dataset = DefaultCLS(root, split="train")
    reference = ImageFolder(root / "train")
    assert dataset.class_names == reference.classes
    assert content(dataset) == [(np.asarray(image).tobytes(), label) for image, label in reference]
    assert [dataset.name(index) for index in range(len(dataset))] == [path for path, _ in reference.samples]


def test_stray_and_hidden_files_are_left_out_and_counted(two_classes, caplog):
    for stray in ("train/ant/notes.txt", "train/.DS_Store", "train/bee/._image 1.png", "train/list.csv"):
        (two_classes / stray).write_bytes(b"x")
    (two_classes / "train" / ".ipynb_checkpoints").mkdir()
    with caplog.at_level("INFO"):
        dataset = DefaultCLS(two_classes, split="train")
    assert len(dataset) == 17
    assert dataset.class_names == ["ant", "bee"]
    assert "4 stray files" in caplog.text


@pytest.mark.parametrize("prefix", ["train/", ""], ids=["relative to the root", "relative to train/"])
def test_list_with_spaces_tabs_and_windows_lines(two_classes, prefix):
    lines = [f"{prefix}bee/image {number}.png {label}" for number, label in ((9, 1), (10, 1), (11, 0))]
    lines[1] = lines[1][:-2] + "\t1"
    (two_classes / "train.txt").write_bytes("\r\n".join([*lines, "", ""]).encode("utf-8-sig"))
    dataset = DefaultCLS(two_classes, split="train")
    assert dataset.labels.tolist() == [1, 1, 0]
    assert [dataset.path(index).name for index in range(3)] == ["image 9.png", "image 10.png", "image 11.png"]
    assert all(dataset.path(index).is_file() for index in range(3))


def test_list_with_a_name_that_is_not_utf_8(two_classes, encoded, pixels):
    name = os.fsdecode(b"caf\xe9.png")
    (two_classes / "train" / "ant" / name).write_bytes(encoded(pixels(0)))
    (two_classes / "train.txt").write_bytes(b"train/ant/caf\xe9.png 0\n")
    dataset = DefaultCLS(two_classes, split="train")
    assert [path.name for path in (dataset.path(0), *dataset.path(0).parent.glob("caf*"))] == [name, name]


def test_flat_validation_images_with_a_list(make_folders, encoded, pixels):
    root = make_folders({"train": {"ant": 2, "bee": 2}})
    (root / "val").mkdir()
    for number in range(3):
        (root / "val" / f"{number}.png").write_bytes(encoded(pixels(number)))
    (root / "val.txt").write_text("0.png 1\n1.png 0\n2.png 1\n")
    dataset = DefaultCLS(root, split="val")
    assert dataset.class_names == ["ant", "bee"]
    assert [label for _, label in content(dataset)] == [1, 0, 1]


def test_list_whose_numbers_contradict_the_class_folders(two_classes):
    (two_classes / "val.txt").write_text("val/ant/image 17.png 1\n")
    with pytest.raises(ValueError, match=r"val\.txt.*ant.*class index 1.*make it 0"):
        DefaultCLS(two_classes, split="val")


@pytest.mark.parametrize("has_train_folders", [True, False])
def test_class_folders_number_a_list_only_where_training_reads_them(make_folders, has_train_folders):
    root = make_folders({"val": {"ant": 1, "bee": 1}})
    if has_train_folders:
        make_folders({"train": {"ant": 1, "bee": 1}}, root)
        (root / "train.txt").write_text("train/bee/image 1.png 0\ntrain/ant/image 0.png 1\n")
    (root / "val.txt").write_text("val/bee/image 1.png 0\nval/ant/image 0.png 1\n")
    dataset = DefaultCLS(root, split="val")
    assert (dataset.class_names, dataset.has_all_classes) == (["bee", "ant"], False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant/image 0.png\n", r"train\.txt, line 1: expected `path class-index`"),
        ("train/ant/image 0.png 0\nx -1", r"line 2.*'x -1'"),
        ("train/ant/image 0.png 0\nx 1.5", "line 2"),
        (
            "train/ant/image 0.png 0\nx 0 1700000000",
            r"train\.txt, line 2: 1700000000 is no class index, the highest is",
        ),
        (f"x {'9' * 5000}", r"line 1: expected `path class-index`"),
        ("\n\n", "is empty"),
        ("nowhere.png 0\n", "not in .*set nor in .*train: nowhere.png"),
    ],
)
def test_broken_lists(two_classes, text, message):
    (two_classes / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        DefaultCLS(two_classes, split="train")


@pytest.mark.parametrize("name", ["train.json", "ILSVRC2011fall_whole_map_train.txt"])
def test_in22k(two_classes, pixels, name):
    entries = [["train/ant/image 0.png", 0], ["train/bee/image 9.png", 7]]
    (two_classes / name).write_text(json.dumps(entries))
    dataset = DATASETS["IN22KDataset"](two_classes, split="train", loader_type="pil")
    assert content(dataset) == [(pixels(0).tobytes(), 0), (pixels(9).tobytes(), 7)]
    assert len(dataset.class_names) == 8


def test_custom_images(tmp_path, encoded, pixels):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"i{number}.png").write_bytes(encoded(pixels(number)))
    (tmp_path / "val.json").write_text('{"i2.png": 1, "i0.png": 0}')
    dataset = DATASETS["CustomImageDataset"](tmp_path, split="val", loader_type="pil")
    assert content(dataset) == [(pixels(2).tobytes(), 1), (pixels(0).tobytes(), 0)]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("IN22KDataset", '{"a": 1}', "expected a list"),
        ("IN22KDataset", "[[1, 2]]", "entry 0: expected \\[path, label\\]"),
        ("IN22KDataset", '[["a", "b"]]', "'a': the label is 'b'"),
        ("IN22KDataset", "[]", "names no image"),
        ("CustomImageDataset", '{"a": -1}', "'a': the label is -1"),
        ("CustomImageDataset", '{"a": true}', "the label is True"),
        ("CustomImageDataset", '{"a": 1700000000}', "'a': 1700000000 is no class index"),
        ("IN22KDataset", '[["a", 100000000000000000000]]', "'a': 1.* is no class index"),
        ("CustomImageDataset", '{"a": 1', "cut short"),
        ("CustomImageDataset", '{"a": 1}', "not in .*images: a"),
        ("INAT18CLS", '{"images": []}', "no entry 'categories'"),
    ],
)
def test_broken_json(tmp_path, kind, text, message):
    (tmp_path / ("train2018.json" if kind.startswith("INAT") else "train.json")).write_text(text)
    with pytest.raises(ValueError, match=message):
        DATASETS[kind](tmp_path, split="train", loader_type="pil")


@pytest.mark.parametrize("kind", ["IN22KDataset", "CustomImageDataset", "INAT18CLS", "INAT19CLS"])
def test_missing_json_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match=r"holds no (train\.json|train201[89]\.json)"):
        DATASETS[kind](tmp_path, split="train", loader_type="pil")


@pytest.mark.parametrize(("kind", "year"), [("INAT18CLS", 2018), ("INAT19CLS", 2019)])
def test_inaturalist(tmp_path, encoded, pixels, kind, year):
    names = [f"train_val{year}/Plantae/{number}/{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encoded(pixels(number)))
    annotated = {
        "images": [{"id": 10 + number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": 12, "category_id": 3}, {"image_id": 10, "category_id": 5},
                        {"image_id": 11, "category_id": 4}],
        "categories": [{"id": 5, "name": "oak", "supercategory": "tree"},
                       {"id": 3, "name": "elm", "supercategory": "tree"},
                       {"id": 4, "name": "fern", "supercategory": "low"}],
    }  # fmt: skip
    (tmp_path / f"train{year}.json").write_text(json.dumps(annotated))
    dataset = DATASETS[kind](tmp_path, split="train", loader_type="pil")
    assert dataset.class_names == ["elm", "fern", "oak"]
    assert content(dataset) == [(pixels(0).tobytes(), 2), (pixels(1).tobytes(), 1), (pixels(2).tobytes(), 0)]
    coarse = DATASETS[kind](tmp_path, split="train", loader_type="pil", category="supercategory")
    assert coarse.class_names == ["tree", "low"]
    assert coarse.labels.tolist() == [0, 1, 0]


def write_cifar(monkeypatch, root, reader, label_key):
    """Write files like the published ones, and teach torchvision their checksums."""
    folder = root / reader.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    files = {}
    for number, (name, _) in enumerate(reader.train_list + reader.test_list):
        files[name] = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), label_key: [0, 1, 2, number % 2]}
    files[reader.meta["filename"]] = {reader.meta["key"]: ["x", "y", "z"]}
    sums = {}
    for name, value in files.items():
        data = pickle.dumps(value, protocol=2)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    for entries in ("train_list", "test_list"):
        monkeypatch.setattr(reader, entries, [[name, sums[name]] for name, _ in getattr(reader, entries)])
    meta = reader.meta["filename"]
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums[meta]})
    return files


@pytest.mark.parametrize(
    ("kind", "reader", "label_key", "test_file", "num_train"),
    [("Cifar10CLS", CIFAR10, "labels", "test_batch", 20), ("Cifar100CLS", CIFAR100, "fine_labels", "test", 4)],
)
def test_cifar(tmp_path, monkeypatch, kind, reader, label_key, test_file, num_train):
    files = write_cifar(monkeypatch, tmp_path, reader, label_key)
    assert len(DATASETS[kind](tmp_path, split="train", loader_type="pil")) == num_train
    dataset = DATASETS[kind](tmp_path, split="val", loader_type="pil")
    assert dataset.class_names == ["x", "y", "z"]
    expected = files[test_file]["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert content(dataset) == list(zip((p.tobytes() for p in expected), files[test_file][label_key], strict=True))


def test_cifar_refuses_files_that_are_not_the_published_ones(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (folder / name).write_bytes(pickle.dumps({"data": [], "labels": []}))
    with pytest.raises(ValueError, match="not as published; unpack https://"):
        DATASETS["Cifar10CLS"](tmp_path, split="train", loader_type="pil")


def test_fingerprint_follows_content_not_place(make_folders, tmp_path):
    counts = {"train": {"a": 2, "b": 2}}
    here, there = (make_folders(counts, root=tmp_path / place) for place in ("here", "there"))
    first = DefaultCLS(here, split="train").fingerprint()
    assert DefaultCLS(there, split="train").fingerprint() == first
    (there / "train/a/image 0.png").rename(there / "train/b/image 0.png")
    moved = DefaultCLS(there, split="train").fingerprint()
    (there / "train/b/image 0.png").unlink()
    assert len({first, moved, DefaultCLS(there, split="train").fingerprint()}) == 3


def test_bytes_table():
    strings = [b"", b"ab", b"", "ü".encode(), b"c"]
    table = BytesTable(strings)
    assert list(table) == strings
    assert (len(table), table[-1], table[1:3]) == (5, b"c", [b"ab", b""])
    assert table.digest() != BytesTable([b"a", b"b", b"", "ü".encode(), b"c"]).digest()
    with pytest.raises(IndexError):
        table[5]
