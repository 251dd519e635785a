"""The download command, and how ImageNet's validation set is told from others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

from data.base import FileDataset, index_names
from model.mobilemamba import variant_shapes
from model.zoo import find
from weights import download
from weights.validation_set import doubts_about

NAMES = ImageNetInfo("imagenet-1k").label_names()
IMAGENET = find("mobilemamba_t2").dataset


def dataset(tmp_path, *, names=NAMES, stem="ILSVRC2012_val_{:08d}", labels=None, count=50_000):
    """Return a set that is listed, with no files behind it."""
    labels = np.arange(count) % 1000 if labels is None else labels
    files = [f"{names[label]}/{stem.format(index + 1)}.JPEG" for index, label in enumerate(labels)]
    return FileDataset(
        tmp_path, files, labels, source=tmp_path, class_names=names, has_all_classes=True, loader_type="pil"
    )


def test_imagenets_validation_set_is_recognised_in_folders_and_in_numbered_lists(tmp_path):
    assert doubts_about(dataset(tmp_path), IMAGENET) == []
    assert doubts_about(dataset(tmp_path, names=index_names(1000)), IMAGENET) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 49_999}, "49,999 images, where ImageNet-1K validation has 50,000: a subset"),
        ({"count": 51_000}, "another set"),
        ({"stem": "train_{}"}, "not named as those of ImageNet-1K validation, as ILSVRC2012_val_00000001"),
        ({"names": sorted(name[::-1] for name in NAMES)}, "the class names are not those"),
        ({"labels": np.minimum(np.arange(50_000) % 1000, 998)}, "not every class has 50 images"),
    ],
)
def test_other_sets_are_told_apart(tmp_path, change, message):
    assert message in doubts_about(dataset(tmp_path, **change), IMAGENET)[0]


def test_an_unknown_list_of_classes_is_named(tmp_path):
    unknown = dataclasses.replace(IMAGENET, class_list="imagenet-5k")
    with pytest.raises(ValueError, match="imagenet-1k has class_list 'imagenet-5k': Unknown imagenet subset"):
        doubts_about(dataset(tmp_path), unknown)


@pytest.fixture
def mirror(tmp_path):
    """A folder with T2 alone."""
    weights = {name: torch.zeros(shape) for name, shape in variant_shapes()["MobileMamba_T2"].items()}
    (tmp_path / "mirror").mkdir()
    torch.save({"net": weights}, tmp_path / "mirror" / "mobilemamba_t2.pth")
    return tmp_path / "mirror"


def test_several_are_downloaded_and_what_is_missing_does_not_stop_the_others(mirror, weights_folder, capsys):
    assert download.main(["mobilemamba_t4", "mobilemamba_t2", "--from", str(mirror)]) == 2
    shown = capsys.readouterr().out
    assert "mobilemamba_t2.pth, verified" in shown
    assert "1 of 2 are missing: mobilemamba_t4" in shown
    assert (weights_folder / "MobileMamba_T2" / "mobilemamba_t2.pth").is_file()
    assert download.main(["mobilemamba_t2", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "was here already" in shown
    assert sum(line.endswith(" here") for line in shown.splitlines()) == 1


def test_an_unknown_name_is_one_line_with_the_nearest(weights_folder, capsys):
    assert download.main(["mobilemamba-t2s"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: there is no released checkpoint 'mobilemamba-t2s'; the nearest is 'mobilemamba_t2s'"
    )
    assert error.count("\n") == 1
