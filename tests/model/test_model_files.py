"""Files and folders that are written aside: whole or not there, and nothing left behind."""

import pytest

from model.files import remove_leftovers, replacing, replacing_folder


def fill(path, text):
    (path / "inner").mkdir()
    (path / "inner" / "file").write_text(text)


def test_file_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "not there yet" / "folder"
    with replacing_folder(path) as aside:
        fill(aside, "old")
        assert not path.exists()
    (path / "more").touch()
    with replacing_folder(path) as aside:
        fill(aside, "new")
        assert (path / "inner" / "file").read_text() == "old"
    assert sorted(path.rglob("*")) == [path / "inner", path / "inner" / "file"]
    assert (path / "inner" / "file").read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def fail_in_file(path):
    with replacing(path) as aside:
        aside.write_text("ne")
        raise ValueError("half")


def fail_in_folder(path):
    with replacing_folder(path) as aside:
        fill(aside, "ne")
        raise ValueError("half")


def test_error_leaves_what_was_there(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    fill(folder, "old")
    for write, path in ((fail_in_file, file), (fail_in_folder, folder)):
        with pytest.raises(ValueError, match="half"):
            write(path)
    assert file.read_text() == (folder / "inner" / "file").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_leftovers_of_one_name_or_of_all_are_removed(tmp_path):
    own, other = tmp_path / ".data[1].ab.part", tmp_path / ".data1.ab.part"
    own.mkdir()
    fill(own, "half")
    other.write_text("half")
    with replacing_folder(tmp_path / "data[1]") as aside:
        fill(aside, "whole")
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "data[1]"]
    assert remove_leftovers(tmp_path) == [other]
    assert list(tmp_path.iterdir()) == [tmp_path / "data[1]"]
