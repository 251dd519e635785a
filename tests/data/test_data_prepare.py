"""The converter, its check, and the digits."""

import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data import check_dataset
from data.digits import write_digits
from data.lmdb_file import write_lmdb
from data.prepare import folder_to_lmdb, lmdb_to_folder, main, verify
from data.split import split_folder


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def packed(two_classes, tmp_path):
    folder_to_lmdb(two_classes, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_round_trip_is_byte_identical(make_folders, tmp_path, image_format):
    counts = {"train": {"a b": 3, "c/deep": 1, "c": 2, "ü": 1}, "val": {"a b": 1, "c": 1, "ü": 2}}
    root = make_folders(counts, image_format=image_format)
    assert folder_to_lmdb(root, tmp_path / "packed") == {"train": 7, "val": 4}
    assert lmdb_to_folder(tmp_path / "packed", tmp_path / "again") == {"train": 7, "val": 4}
    assert files(tmp_path / "again") == files(root)


def test_one_split_alone(make_folders, tmp_path):
    root = make_folders({"val": {"a": 2}})
    assert folder_to_lmdb(root, tmp_path / "packed") == {"val": 2}
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["val.lmdb"]


def test_listed_files_are_sorted_into_classes(two_classes, tmp_path, make_config):
    (two_classes / "val.txt").write_text("flat 1.png 1\nflat 0.png 0\n")
    for number in range(2):
        (two_classes / "val" / f"flat {number}.png").write_bytes(b"%d" % number)
    folder_to_lmdb(two_classes, tmp_path / "packed")
    lmdb_to_folder(tmp_path / "packed", tmp_path / "again")
    assert files(tmp_path / "again" / "val") == {"ant/flat 0.png": b"0", "bee/flat 1.png": b"1"}
    check_dataset(make_config(tmp_path / "again"))


def test_splits_of_different_classes_are_refused(make_folders, tmp_path):
    root = make_folders({"train": {"a": 1, "b": 1}, "val": {"a": 1}})
    with pytest.raises(ValueError, match=r"the classes differ: 2 in .*train, 1 in .*val"):
        folder_to_lmdb(root, tmp_path / "packed")


def test_files_of_the_published_layout_are_unpacked_by_number(tmp_path, store, encoded, pixels):
    data = {b"0": encoded(pixels(0)), b"1": encoded(pixels(1), "JPEG")}
    with store(tmp_path / "val.lmdb") as transaction:
        for label, (key, value) in enumerate(data.items()):
            transaction.put(key, pickle.dumps((value, 10 + label)))
        transaction.put(b"__keys__", pickle.dumps(list(data)))
        transaction.put(b"__len__", pickle.dumps(2))
    lmdb_to_folder(tmp_path, tmp_path / "out")
    assert files(tmp_path / "out") == {"val/00010/0000000000.png": data[b"0"], "val/00011/0000000001.jpg": data[b"1"]}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    write_lmdb(tmp_path / "val.lmdb", [(name, b"x", 0)], class_names=["a"])
    with pytest.raises(ValueError, match="not a path inside a folder"):
        lmdb_to_folder(tmp_path, tmp_path / "out")
    assert files(tmp_path / "out") == {}


def test_nothing_is_replaced_unless_forced(two_classes, packed, tmp_path, capsys):
    before = files(packed)
    assert main(["folder-to-lmdb", str(two_classes), str(packed)]) == 2
    assert "train.lmdb" in (message := capsys.readouterr().err)
    assert "--force" in message
    assert files(packed) == before
    assert main(["folder-to-lmdb", "--force", str(two_classes), str(packed)]) == 0
    out = tmp_path / "out"
    assert main(["lmdb-to-folder", str(packed), str(out)]) == 0
    (out / "val" / "ant" / "mine.txt").write_text("x")
    assert main(["lmdb-to-folder", str(packed), str(out)]) == 2
    assert (out / "val" / "ant" / "mine.txt").exists()
    assert main(["lmdb-to-folder", str(packed), str(out), "--force"]) == 0
    assert files(out) == files(two_classes)


def test_leftover_of_a_killed_conversion_is_no_data_set(two_classes, packed):
    (packed / ".train.lmdb.0.part").write_bytes(b"half")
    folder_to_lmdb(two_classes, packed, is_forced=True)
    assert sorted(path.name for path in packed.iterdir()) == ["train.lmdb", "val.lmdb"]


def test_verify_passes_what_is_whole(two_classes, packed, capsys):
    assert main(["verify", str(packed), "--against", str(two_classes), "--decode"]) == 0
    assert "17 images in train, 7 images in val" in capsys.readouterr().out


def test_verify_finds_what_differs(two_classes, packed):
    (two_classes / "train/ant/image 0.png").write_bytes(b"changed")
    (two_classes / "val/ant/image 17.png").unlink()
    counts, problems = verify(packed, against=two_classes)
    assert counts == {"train": 17, "val": 7}
    assert len(problems) == 2
    assert "the bytes differ from" in problems[0]
    assert "has 7 images" in problems[1]


def test_verify_finds_undecodable_images_and_wrong_labels(tmp_path, encoded, pixels, capsys):
    records = [("a/0.png", encoded(pixels(0)), 0), ("a/1.png", b"no image", 0), ("b/2.png", encoded(pixels(2)), 4)]
    write_lmdb(tmp_path / "val.lmdb", records, class_names=["a", "b"])
    assert len(verify(tmp_path)[1]) == 1
    assert main(["verify", str(tmp_path), "--decode"]) == 1
    message = capsys.readouterr().err
    assert "2 problems" in message
    assert "a/1.png: unreadable image" in message
    assert "b/2.png: class index 4, but there are 2 classes" in message


@pytest.mark.parametrize("command", ["folder-to-lmdb", "lmdb-to-folder", "verify"])
def test_empty_source(tmp_path, capsys, command):
    arguments = [command, str(tmp_path), *([] if command == "verify" else [str(tmp_path / "out")])]
    assert main(arguments) == 2
    assert "holds neither of" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["index", "verify"])
def test_a_missing_folder_is_said_to_be(packed, capsys, command):
    assert main([command, f"{packed}s"]) == 2
    assert f"there is no folder {packed}s; the nearest in {packed.parent}: {packed.name}" in capsys.readouterr().err


def test_digits(tmp_path, make_config, capsys):
    out = tmp_path / "with space" / "digits"
    assert main(["digits", str(out)]) == 0
    written = files(out)
    assert len(written) == 1797
    digits = load_digits()
    counts = np.bincount(digits.target)
    for split, share in (("train", 0.8), ("val", 0.2)):
        of_class = [len(list((out / split / str(digit)).iterdir())) for digit in range(10)]
        np.testing.assert_allclose(of_class, counts * share, atol=1)
    assert len(list((out / "val").rglob("*.png"))) == 360
    for name in list(written)[::100]:
        number = int(name[-8:-4])
        image = np.asarray(Image.open(out / name))
        assert name.split("/")[1] == str(digits.target[number])
        np.testing.assert_allclose(image / 255 * 16, digits.images[number], atol=0.04)
    check_dataset(make_config(out, num_classes=10))
    assert main(["digits", str(out)]) == 0
    assert "already there" in capsys.readouterr().out
    assert write_digits(tmp_path / "second")
    assert files(tmp_path / "second") == written


def test_digits_do_not_mix_with_other_files(tmp_path, capsys):
    write_digits(tmp_path / "digits")
    next((tmp_path / "digits").rglob("*.png")).unlink()
    assert main(["digits", str(tmp_path / "digits")]) == 2
    assert "holds other files than the digits" in capsys.readouterr().err


def test_a_split_shares_out_every_class_and_copies_every_image(tmp_path, make_folders, make_config, capsys):
    root = make_folders({"all": {"ant": 10, "bee": 4, "cow": 2}}) / "all"
    (root / "ant" / "notes.txt").write_text("")
    assert main(["split", str(root), str(tmp_path / "out"), "--share", "0.3"]) == 0
    assert "11 images in train, 5 in val" in capsys.readouterr().out.replace("images in val", "in val")
    counts = {
        (split, name): len(list((tmp_path / "out" / split / name).iterdir()))
        for split in ("train", "val")
        for name in ("ant", "bee", "cow")
    }
    assert list(counts.values()) == [7, 3, 1, 3, 1, 1]
    copied = {name.split("/", 1)[1]: data for name, data in files(tmp_path / "out").items()}
    assert copied == {name: data for name, data in files(root).items() if name.endswith(".png")}
    check_dataset(make_config(tmp_path / "out", num_classes=3))
    assert main(["split", str(root), str(tmp_path / "again"), "--share", "0.3"]) == 0
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_split_that_cannot_be_is_refused(tmp_path, make_folders, capsys):
    root = make_folders({"all": {"ant": 3, "bee": 1}})
    for source, message in ((root / "all", "fewer than two images"), (root / "all" / "ant", "no class folders")):
        assert main(["split", str(source), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["split", str(root), str(root)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("train", "val"), ("train", "test"), ("train",)])
def test_a_split_of_a_split_folder_is_refused(tmp_path, make_folders, names):
    root = make_folders({name: {"a": 3, "b": 3} for name in names})
    with pytest.raises(ValueError, match=r"is split already: it holds .*train"):
        split_folder(root, tmp_path / "out", share=0.2)
    assert not (tmp_path / "out").exists()


def test_classes_may_be_called_like_splits(tmp_path, make_folders):
    root = make_folders({"all": {"train": 3, "test": 3}})
    assert split_folder(root / "all", tmp_path / "out", share=0.4) == {"train": 4, "val": 2}


@pytest.mark.parametrize("place", ["out", "a/out", "../all/out", "link/out"])
def test_a_split_into_its_source_is_refused(tmp_path, make_folders, place):
    root = make_folders({"all": {"a": 3, "b": 3}}) / "all"
    (root / "link").symlink_to(root)
    before = files(root)
    with pytest.raises(ValueError, match=r"lies inside .*all, where it would count as a class"):
        split_folder(root, root / place, share=0.2)
    assert files(root) == before


def test_a_split_copies_no_device(tmp_path, make_folders):
    root = make_folders({"all": {"a": 3}}) / "all"
    (root / "a" / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="a pipe or device"):
        split_folder(root, tmp_path / "out", share=0.2)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line(tmp_path, make_folders, monkeypatch, capsys):
    root = make_folders({"all": {"a": 3}}) / "all"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.split.read_file", interrupted)
    assert main(["split", str(root), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (tmp_path / "out").exists()
