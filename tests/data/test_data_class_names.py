"""Names of classes: the checkpoint's own, the folders', ImageNet's, or none."""

import pytest

from configs.schema import Data
from data import find_class_names

SYNSETS = ["n01440764", "n01443537", "n02123045"]


@pytest.fixture
def folders(tmp_path):
    for split, names in (("train", ("ant", "bee")), ("val", ("ant", "bee", "cow"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
    return Data(root=str(tmp_path))


def test_a_checkpoints_own_names_come_first(folders):
    names = find_class_names(["x", "y"], folders, num_classes=2)
    assert (names.identifiers, names.words) == (["x", "y"], ["x", "y"])
    assert "checkpoint" in names.origin


@pytest.mark.parametrize("saved", [None, ["x"], "xy", [1, 2], {"x": 0, "y": 1}])
def test_folders_of_the_right_number_come_next(folders, saved):
    assert find_class_names(saved, folders, num_classes=2).words == ["ant", "bee"]
    assert find_class_names(saved, folders, num_classes=3).words == ["ant", "bee", "cow"]


def test_a_thousand_classes_are_imagenets(folders):
    names = find_class_names(None, folders, num_classes=1000)
    assert names.identifiers[0] == "n01440764"
    assert names.words[281] == "tabby, tabby cat"
    assert names.words[999].startswith("toilet tissue")
    assert names.words[134] == names.words[517] == "crane"
    assert names.identifiers[134] != names.identifiers[517]


def test_synsets_are_put_into_words():
    assert find_class_names(SYNSETS, Data(root="none"), num_classes=3).words == [
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
        "tabby, tabby cat",
    ]
    assert find_class_names(["n99999999"], Data(root="none"), num_classes=1).words == ["n99999999"]
    assert find_class_names(["n01440764", "cat"], Data(root="none"), num_classes=2).words == ["n01440764", "cat"]


def test_else_the_indices_stand_in(folders):
    names = find_class_names(None, folders, num_classes=12)
    assert names.words[:2] == ["00", "01"]
    assert "indices" in names.origin
