"""What is wrong with a data set is said before the first step, with the way out."""

import pytest

from data import build_loaders, check_dataset, count_classes, open_first


def test_a_good_set_passes(two_classes, make_config):
    check_dataset(make_config(two_classes))
    loaders = build_loaders(make_config(two_classes), rank=0, world_size=1)
    assert loaders.class_names == ["ant", "bee"]
    assert (len(loaders.train), len(loaders.test), loaders.test.num_images) == (4, 2, 7)


@pytest.mark.parametrize("mode", ["test", "test_net"])
def test_testing_needs_no_training_split(make_folders, make_config, mode):
    root = make_folders({"val": {"ant": 1, "bee": 2}})
    loaders = build_loaders(make_config(root, mode=mode), rank=0, world_size=1)
    assert loaders.train is None
    assert loaders.class_names == ["ant", "bee"]


@pytest.mark.parametrize(
    ("counts", "num_classes", "message"),
    [
        ({"val": {"a": 1, "b": 1}}, 2, r"/train does not exist.*folders in .*: val"),
        ({"train": {"a": 1, "b": 1}}, 2, "/val does not exist"),
        ({"train": {"a": 1, "b": 0, "c": 0}, "val": {"a": 1}}, 2, r"2 of 3 class folders hold no image \(b, c\)"),
        ({"train": {"a": 1, "b": 1}, "val": {"a": 0, "b": 1}}, 2, r"/val: 1 of 2 class folders .*\(a\)"),
        ({"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1}}, 3, "train has 2 classes, but nb_classes is 3; .*=2"),
        ({"train": {"a": 1, "b": 1}, "val": {"a": 1, "c": 1, "d": 1}}, 2,
         "2 in .*train, 3 in .*val; only in .*train: b; only in .*val: c, d;"),
    ],
)  # fmt: skip
def test_class_folders(make_folders, make_config, counts, num_classes, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(make_config(make_folders(counts), num_classes=num_classes))


def test_missing_root(tmp_path, make_config):
    with pytest.raises(ValueError, match=r"data\.root=.*nowhere: there is no such folder; set data\.root"):
        check_dataset(make_config(tmp_path / "nowhere"))


def test_flat_and_empty_validation_folder(make_folders, make_config, encoded, pixels):
    root = make_folders({"train": {"a": 1, "b": 1}})
    (root / "val").mkdir()
    with pytest.raises(ValueError, match="/val is empty"):
        check_dataset(make_config(root))
    for number in range(3):
        (root / "val" / f"{number}.png").write_bytes(encoded(pixels(number)))
    with pytest.raises(ValueError, match=r"holds 3 images but no class folder; .*val/<class>/<image>.*val\.txt"):
        check_dataset(make_config(root))


def test_class_index_out_of_range_in_a_list(two_classes, make_config):
    (two_classes / "train.txt").write_text("train/ant/image 0.png 0\ntrain/bee/image 9.png 1\n")
    check_dataset(make_config(two_classes))
    (two_classes / "val.txt").write_text("val/ant/image 17.png 0\nval/bee/image 21.png 2\n")
    with pytest.raises(ValueError, match=r"val\.txt has at least 3 classes, but nb_classes is 2"):
        check_dataset(make_config(two_classes))


def test_class_without_training_image_is_warned_of(two_classes, make_config, caplog):
    (two_classes / "train.json").write_text('[["train/ant/image 0.png", 0], ["train/bee/image 9.png", 2]]')
    (two_classes / "val.json").write_text('[["val/ant/image 17.png", 0]]')
    check_dataset(make_config(two_classes, num_classes=3, type="IN22KDataset"))
    assert "no image of 1 classes: 1" in caplog.text


def test_too_few_images_for_a_batch(two_classes, make_config):
    with pytest.raises(ValueError, match="17 images make no batch of 9 on each of 2 processes; lower batch_size"):
        build_loaders(make_config(two_classes, batch_size=9), rank=0, world_size=2)


@pytest.mark.parametrize(("mode", "expected"), [("train", 2), ("ft", 2), ("test", 3)])
def test_classes_are_counted_in_the_split_that_is_read(make_folders, make_config, mode, expected):
    root = make_folders({"train": {"a": 1, "b": 1}, "val": {"a": 1, "b": 1, "c": 1}})
    assert count_classes(open_first(make_config(root, num_classes=None, mode=mode))) == expected


def test_a_list_counts_where_it_is_of_all_classes(make_folders, make_config):
    root = make_folders({"all": {"a": 1, "b": 1}})
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("all/a/image 0.png 0\nall/b/image 1.png 4\n")
    assert count_classes(open_first(make_config(root, num_classes=None))) == 5
    with pytest.raises(ValueError, match=r"val\.txt does not say .*at least 5 .*: set nb_classes"):
        count_classes(open_first(make_config(root, num_classes=None, mode="test")))
    with pytest.raises(ValueError, match=r"data\.root=.*none: there is no such folder"):
        count_classes(open_first(make_config(root / "none", num_classes=None)))
