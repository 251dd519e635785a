"""The synthetic COCO and ADE20K against independent readings of them, and the check of a folder."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from downstream.data.__main__ import main
from downstream.data.check import check_ade20k, check_coco, label_problem
from downstream.data.layout import COCO_CATEGORIES
from downstream.data.shapes import KINDS, draw_scene
from downstream.data.synthetic import CATEGORY_IDS, GROUND_LABEL, LABELS, run_lengths, write_ade20k, write_coco

SIZE = (96, 128)


@pytest.fixture
def coco(tmp_path):
    write_coco(tmp_path / "my coco", num_train=16, num_val=3, size=SIZE)
    return tmp_path / "my coco"


@pytest.fixture
def ade20k(tmp_path):
    write_ade20k(tmp_path / "my ade", num_train=6, num_val=3, size=SIZE)
    return tmp_path / "my ade" / "ADEChallengeData2016"


def annotations_of(root, split="train2017"):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def change(root, function, split="train2017"):
    annotations = annotations_of(root, split)
    function(annotations)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(annotations))


def decoded(run_length):
    flat = np.concatenate([np.full(count, index % 2) for index, count in enumerate(run_length["counts"])])
    return flat.reshape(run_length["size"], order="F").astype(bool)


def test_boxes_and_areas_are_those_of_the_drawn_pixels():
    for seed in range(20):
        scene = draw_scene(*SIZE, seed=(seed,))
        assert 1 <= len(scene.shapes) <= 4
        for shape in scene.shapes:
            left, top, width, height = shape.box
            inside = np.zeros(SIZE, dtype=bool)
            inside[top : top + height, left : left + width] = True
            assert not (shape.mask & ~inside).any()
            assert shape.mask[:, [left, left + width - 1]].any(axis=0).all()
            assert shape.mask[[top, top + height - 1]].any(axis=1).all()
            bounds = np.concatenate([shape.polygon.min(axis=0), shape.polygon.max(axis=0)])
            assert np.abs(bounds - (left, top, left + width, top + height)).max() < 3  # a tip may miss every centre
        assert sum(shape.mask.astype(int) for shape in scene.shapes).max() == 1


def test_shapes_have_colours_of_their_own():
    means = [[] for _ in range(KINDS)]
    for seed in range(40):
        scene = draw_scene(*SIZE, seed=(seed,))
        for shape in scene.shapes:
            means[shape.kind].append(scene.image[shape.mask].mean(axis=0))
    centres = np.array([np.mean(kind, axis=0) for kind in means])
    for kind, colours in enumerate(means):
        distances = np.linalg.norm(np.array(colours)[:, None] - centres, axis=2)
        assert (distances.argmin(axis=1) == kind).all()


def test_polygons_enclose_the_pixels(coco):
    for annotation in annotations_of(coco)["annotations"]:
        if not annotation["iscrowd"]:
            x, y = np.array(annotation["segmentation"][0]).reshape(-1, 2).T
            shoelace = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
            assert annotation["area"] == pytest.approx(shoelace, rel=0.06)
            left, top, width, height = annotation["bbox"]
            assert np.abs([x.min() - left, x.max() - left - width, y.min() - top, y.max() - top - height]).max() < 3


def test_pycocotools_reads_the_same(coco):
    coco_api = pytest.importorskip("pycocotools.coco").COCO
    read = coco_api(str(coco / "annotations" / "instances_train2017.json"))
    assert sorted(read.getCatIds()) == sorted(COCO_CATEGORIES)
    crowds = 0
    for annotation in read.loadAnns(read.getAnnIds()):
        mask = read.annToMask(annotation)
        crowds += annotation["iscrowd"]
        tolerance = 0 if annotation["iscrowd"] else 0.1
        assert mask.shape == SIZE
        assert int(mask.sum()) == pytest.approx(annotation["area"], rel=tolerance)
    assert crowds


def test_run_lengths_give_the_mask_back():
    random = np.random.default_rng(0)
    for mask in (random.random((5, 7)) < 0.5, np.ones((2, 3), bool), np.zeros((2, 3), bool)):
        assert (decoded(run_lengths(mask)) == mask).all()


def test_label_maps_show_what_is_drawn(ade20k):
    for index, path in enumerate(sorted((ade20k / "annotations" / "training").iterdir())):
        scene = draw_scene(*SIZE, seed=(0, 0, index))
        labels = np.asarray(Image.open(path))
        assert labels.shape == SIZE
        assert (labels[scene.blank] == 0).all()
        for shape in scene.shapes:
            assert (labels[shape.mask] == LABELS[shape.kind]).all()
        assert set(np.unique(labels)) <= {0, GROUND_LABEL, *LABELS}
        image = np.asarray(Image.open(ade20k / "images" / "training" / f"{path.stem}.jpg")).astype(int)
        assert np.abs(image - scene.image).mean() < 12  # JPEG


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_coco(tmp_path / name, num_train=2, num_val=1, size=SIZE, seed=seed)
    files = {name: sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "abc"}
    read = {name: [path.read_bytes() for path in paths] for name, paths in files.items()}
    assert read["a"] == read["b"]
    assert read["a"] != read["c"]


def test_splits_differ(coco):
    first = [(coco / split / f"{1:012d}.jpg").read_bytes() for split in ("train2017", "val2017")]
    assert first[0] != first[1]


def test_known_classes_are_used():
    assert set(CATEGORY_IDS) <= set(COCO_CATEGORIES)
    assert len(COCO_CATEGORIES) == 80
    assert {1, 150} <= {GROUND_LABEL, *LABELS}


def test_whole_folders_pass(coco, ade20k):
    assert check_coco(coco, is_any_size=True) == ({"train2017": 16, "val2017": 3}, [])
    expected = ({"training": 6, "validation": 3}, [])
    assert check_ade20k(ade20k, is_any_size=True) == expected
    assert check_ade20k(ade20k.parent, is_any_size=True) == expected


def test_published_numbers_are_expected(coco, ade20k):
    problems = check_coco(coco)[1] + check_ade20k(ade20k)[1]
    numbers = [re.search(r"has (\S+) images, the published set (\S+) ", problem).groups() for problem in problems]
    assert numbers == [("16", "118,287"), ("3", "5,000"), ("6", "20,210"), ("3", "2,000")]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "annotations" / "instances_val2017.json").unlink(), "instances_val2017.json is missing"),
        (lambda root: (root / "train2017").rename(root / "train"), "train2017 is missing"),
        (lambda root: (root / "train2017" / f"{3:012d}.jpg").unlink(), "1 images of .*: 000000000003.jpg"),
        (lambda root: (root / "annotations" / "instances_train2017.json").write_text('{"images": ['), "truncated"),
        (lambda root: (root / "annotations" / "instances_train2017.json").write_text("[]"), "lacks one of the lists"),
        (lambda root: change(root, lambda a: a["categories"].pop(0)), "79 categories"),
        (
            lambda root: change(root, lambda a: a["annotations"][0].update(category_id=12)),
            "categories that it does not",
        ),
        (lambda root: change(root, lambda a: a["annotations"][0].update(image_id=99)), "images that it does not list"),
        (lambda root: change(root, lambda a: a["annotations"][0].update(bbox=[100, 0, 60, 5])), "leave their image: 1"),
        (lambda root: change(root, lambda a: a["images"].append(a["images"][0])), "lists 1 images twice"),
        (lambda root: change(root, lambda a: a["images"][0].pop("file_name")), "not COCO's: KeyError 'file_name'"),
    ],
)
def test_damaged_coco(coco, damage, message):
    damage(coco)
    problems = check_coco(coco, is_any_size=True)[1]
    assert len(problems) == 1
    assert re.search(message, problems[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "annotations" / "validation").rename(root / "labels"), "validation is missing"),
        (lambda root: next((root / "annotations" / "training").iterdir()).unlink(), "1 images without a label map"),
        (lambda root: next((root / "images" / "training").iterdir()).unlink(), "1 label maps without an image"),
    ],
)
def test_damaged_ade20k(ade20k, damage, message):
    damage(ade20k)
    problems = check_ade20k(ade20k, is_any_size=True)[1]
    assert len(problems) == 1
    assert re.search(message, problems[0])


def test_classes_of_ones_own(coco, capsys):
    shapes = ["circle", "square", "kite", "star"]

    def rename(annotations):
        annotations["categories"] = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, shapes, strict=True)]

    for split in ("train2017", "val2017"):
        change(coco, rename, split)
    assert "4 categories, or other ids, than COCO's 80" in check_coco(coco, is_any_size=True)[1][0]
    assert check_coco(coco, classes=shapes[::-1]) == ({"train2017": 16, "val2017": 3}, [])
    assert main(["check", "coco", str(coco), "--classes", *shapes]) == 0
    assert main(["check", "coco", str(coco), "--classes"]) == 0
    assert main(["check", "coco", str(coco), "--classes", "circle", "square"]) == 1
    said = capsys.readouterr().err
    assert f"{coco} is not a data set in the layout of coco:" in said
    assert "has the categories circle, square, kite, star, expected circle, square" in said
    change(coco, lambda annotations: annotations["categories"].append({"id": 99, "name": "star"}))
    (problem,) = check_coco(coco, classes=())[1]
    assert "lists a category twice" in problem
    assert main(["check", "ade20k", str(coco), "--classes", "wall"]) == 2


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 151, np.uint8), "label 151, expected 0..150"),
        (np.full((4, 4, 3), 1, np.uint8), "3 channels"),
        (np.full((4, 4), 150, np.uint8), None),
        (np.full((4, 4), 255, np.uint8), None),
    ],
)
def test_label_values(tmp_path, ade20k, pixels, message):
    path = ade20k / "annotations" / "training" / "ADE_train_00000002.png"
    Image.fromarray(pixels).save(path)
    problem = label_problem(path)
    assert (problem is None) if message is None else message in problem
    assert bool(check_ade20k(ade20k, is_any_size=True)[1]) == (message is not None)


def test_an_unreadable_label_map(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert "cannot be read" in label_problem(tmp_path / "a.png")


def test_the_command_makes_and_checks(tmp_path, capsys):
    folder = str(tmp_path / "synthetic data")
    assert main(["make", "coco", folder, "--train", "2", "--val", "1", "--size", "64", "80"]) == 0
    assert main(["check", "coco", folder, "--any-size"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder}: 2 images in train2017, 1 images in val2017"] * 2
    assert main(["check", "coco", folder]) == 1
    assert main(["make", "coco", folder]) == 2
    assert main(["check", "ade20k", folder]) == 1
    assert main(["make", "ade20k", f"{folder}2", "--size", "8", "8"]) == 2
    said = capsys.readouterr().err
    for text in ("the published set 5,000", "exists; name another folder", "ADEChallengeData2016.zip", "32 pixels"):
        assert text in said
    assert not (tmp_path / "synthetic data2").exists()
