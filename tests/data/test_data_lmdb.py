"""LMDB files: what is written is read, and what is broken or hostile is refused."""

import os
import pickle

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader

from data import build_loaders, check_dataset, lmdb_file
from data.folders import DefaultCLS
from data.lmdb_file import LmdbFile, write_lmdb
from data.lmdb_folder import ImageFolderLMDB
from data.prepare import folder_to_lmdb


@pytest.fixture
def packed(two_classes, tmp_path):
    folder_to_lmdb(two_classes, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def write_plain(store):
    """Return a function that writes a file as the published layout has it: values, ``__keys__`` and ``__len__``."""

    def write(path, entries, *, length=None, is_folder=False, protocol=4):
        with store(path, is_folder=is_folder) as transaction:
            for key, value in entries.items():
                transaction.put(key, value if isinstance(value, bytes) else pickle.dumps(value, protocol))
            transaction.put(b"__keys__", pickle.dumps(list(entries), protocol))
            transaction.put(b"__len__", pickle.dumps(len(entries) if length is None else length, protocol))

    return write


def test_records_are_those_of_the_folders(two_classes, packed):
    for split in ("train", "val"):
        folders, records = DefaultCLS(two_classes, split=split), ImageFolderLMDB(packed, split=split)
        assert len(records) == len(folders)
        assert records.class_names == folders.class_names
        np.testing.assert_array_equal(records.labels, folders.labels)
        for index in range(len(folders)):
            assert records.file.record(index) == (folders.read_bytes(index), folders.labels[index])
            assert records.load(index)[0].tobytes() == folders.load(index)[0].tobytes()


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_published_layout(tmp_path, write_plain, encoded, pixels, is_folder, protocol):
    entries = {str(number).encode(): (encoded(pixels(number)), number % 3) for number in (5, 10, 2)}
    write_plain(tmp_path / "train.lmdb", entries, is_folder=is_folder, protocol=protocol)
    dataset = ImageFolderLMDB(tmp_path, split="train")
    assert [dataset.load(index)[1] for index in range(3)] == [2, 1, 2]
    assert dataset.load(0)[0].tobytes() == pixels(5).tobytes()
    assert (dataset.class_names, dataset.has_all_classes) == (["0", "1", "2"], False)
    assert dataset.name(1).endswith("train.lmdb:10")


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["value", "__keys__", "__len__"])
def test_pickles_that_hold_code_are_refused_and_do_nothing(tmp_path, store, write_plain, place):
    marker = tmp_path / "attacked"
    write_plain(tmp_path / "val.lmdb", {b"0": Attack(marker) if place == "value" else (b"", 0)})
    if place != "value":
        with store(tmp_path / "val.lmdb") as transaction:
            transaction.put(place.encode(), pickle.dumps(Attack(marker)))
    with pytest.raises(ValueError, match=r"val\.lmdb:.*refused to unpickle .*mkdir"):
        ImageFolderLMDB(tmp_path, split="val")
    assert not marker.exists()


@pytest.mark.parametrize(
    "value", [np.float64(1.0), {1, 2}, ("text", 0), (b"", -1), (b"", "0"), (b"",), b"no pickle"], ids=repr
)
def test_other_values_are_refused(tmp_path, write_plain, value):
    write_plain(tmp_path / "val.lmdb", {b"0": value})
    with pytest.raises(ValueError, match=r"val\.lmdb:0"):
        ImageFolderLMDB(tmp_path, split="val")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, "last page"])
def test_cut_short(packed, share):
    path = packed / "train.lmdb"
    data = path.read_bytes()
    path.write_bytes(data[:-4096] if share == "last page" else data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"train\.lmdb is (cut short|empty|no LMDB file)"):
        LmdbFile(path)


def test_html_in_place_of_the_file(packed):
    (packed / "val.lmdb").write_bytes(b"<html>quota exceeded</html>" * 1000)
    with pytest.raises(ValueError, match=r"val\.lmdb is no LMDB file"):
        LmdbFile(packed / "val.lmdb")


def test_missing_file_names_the_converter(tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.lmdb does not exist; make it with `python -m data\.prepare folder-to"
    ):
        ImageFolderLMDB(tmp_path, split="train")


def test_wrong_counts(tmp_path, store, write_plain, encoded, pixels):
    entries = {str(number).encode(): (encoded(pixels(number)), 0) for number in range(3)}
    write_plain(tmp_path / "val.lmdb", entries, length=4)
    with pytest.raises(ValueError, match=r"val\.lmdb: the counts differ .*'records': 3, '__len__': 4"):
        LmdbFile(tmp_path / "val.lmdb")
    write_plain(tmp_path / "train.lmdb", entries)
    with store(tmp_path / "train.lmdb") as transaction:
        transaction.delete(b"1")
    with pytest.raises(ValueError, match=r"'records': 2, '__len__': 3"):
        LmdbFile(tmp_path / "train.lmdb")


def test_no_pages_without_contents(tmp_path):
    lmdb.open(str(tmp_path / "val.lmdb"), subdir=False).close()
    with pytest.raises(ValueError, match="has no __len__"):
        LmdbFile(tmp_path / "val.lmdb")


def test_opened_at_the_first_read_only(packed):
    file = LmdbFile(packed / "train.lmdb")
    assert file._environment is None
    file.record(0)
    assert file._environment is not None
    copy = pickle.loads(pickle.dumps(file))
    assert copy._environment is None
    assert copy.record(0) == file.record(0)


def test_two_readers_of_one_file(packed):
    first, second = (LmdbFile(packed / "train.lmdb") for _ in range(2))
    assert first.record(1) == second.record(1)
    first.close()
    assert second.record(2) == first.record(2)


@pytest.mark.parametrize("is_open", [False, True], ids=["closed", "open in the parent"])
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_read_in_workers(packed, is_open, context):
    file = LmdbFile(packed / "train.lmdb")
    expected = [LmdbFile(packed / "train.lmdb").record(index) for index in range(len(file))]
    if is_open:
        file.record(0)
    loader = DataLoader(
        Records(file), batch_size=None, num_workers=2, multiprocessing_context=context, collate_fn=tuple
    )
    assert list(loader) == expected
    assert file.record(0) == expected[0]


class Records:
    def __init__(self, file):
        self.file = file

    def __len__(self):
        return len(self.file)

    def __getitem__(self, index):
        return self.file.record(index)


def test_map_grows_as_needed(tmp_path):
    records = [(f"c/{number}", os.urandom(50_000), 0) for number in range(40)]
    write_lmdb(tmp_path / "train.lmdb", iter(records), class_names=["c"], map_size=1 << 16)
    file = LmdbFile(tmp_path / "train.lmdb")
    assert [file.record(index) for index in range(40)] == [(data, label) for _, data, label in records]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.lmdb"]


def test_records_are_stored_as_they_come(tmp_path, monkeypatch):
    events = []
    commit = lmdb_file._commit
    monkeypatch.setattr(lmdb_file, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(lmdb_file, "_commit", lambda *arguments: events.append("commit") or commit(*arguments))

    def records():
        for number in range(6):
            events.append("read")
            yield f"c/{number}", bytes(600), 0

    write_lmdb(tmp_path / "train.lmdb", records(), class_names=["c"])
    assert events == ["read", "read", "commit"] * 3 + ["commit"]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    write_lmdb(tmp_path / "train.lmdb", [("c/0", b"old", 0)], class_names=["c"])

    def failing():
        yield "c/0", b"new", 0
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_lmdb(tmp_path / "train.lmdb", failing(), class_names=["c"])
    assert LmdbFile(tmp_path / "train.lmdb").record(0) == (b"old", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["train.lmdb"]


def test_classes_are_checked(packed, make_config):
    check_dataset(make_config(packed, type="ImageFolderLMDB"))
    with pytest.raises(ValueError, match=r"train\.lmdb has 2 classes, but nb_classes is 5"):
        check_dataset(make_config(packed, type="ImageFolderLMDB", num_classes=5))


def test_class_index_beyond_the_configuration_is_an_error_when_it_is_read(
    tmp_path, write_plain, make_config, encoded, pixels
):
    entries = {b"%03d" % number: (encoded(pixels(number)), int(number == 129)) for number in range(130)}
    for split in ("train", "val"):
        write_plain(tmp_path / f"{split}.lmdb", entries)
    loaders = build_loaders(make_config(tmp_path, type="ImageFolderLMDB", num_classes=1), rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"val\.lmdb:129: the class index 1 is outside 0\.\.0; set nb_classes"):
        list(loaders.test.iterate())


def test_fingerprint_is_that_of_the_content(two_classes, packed, tmp_path):
    first = ImageFolderLMDB(packed, split="train").fingerprint()
    folder_to_lmdb(two_classes, tmp_path / "again")
    assert ImageFolderLMDB(tmp_path / "again", split="train").fingerprint() == first
    next((two_classes / "train" / "bee").iterdir()).unlink()
    folder_to_lmdb(two_classes, tmp_path / "other")
    assert ImageFolderLMDB(tmp_path / "other", split="train").fingerprint() != first


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_cut_short_during_a_run(tmp_path, write_plain, make_config, encoded, pixels, is_folder):
    entries = {b"%d" % number: (encoded(pixels(number, 64)), 0) for number in range(9)}
    for split in ("train", "val"):
        write_plain(tmp_path / f"{split}.lmdb", entries, is_folder=is_folder)
    config = make_config(tmp_path, type="ImageFolderLMDB", num_classes=1, workers=1)
    loader = build_loaders(config, rank=0, world_size=1).train
    path = tmp_path / "train.lmdb" / "data.mdb" if is_folder else tmp_path / "train.lmdb"
    size = path.stat().st_size
    os.truncate(path, 4096)
    with pytest.raises(ValueError, match=rf"{path.name} is cut short: 4096 of {size} bytes; copy or make it again"):
        list(loader.iterate(0))


def test_a_pipe_is_no_lmdb_file(tmp_path):
    os.mkfifo(tmp_path / "train.lmdb")
    with pytest.raises(ValueError, match=r"train\.lmdb is missing or is no regular file"):
        LmdbFile(tmp_path / "train.lmdb")


def test_control_characters_in_names_are_escaped(tmp_path):
    write_lmdb(tmp_path / "train.lmdb", [("c/\x1b[2J\n.png", b"x", 0)], class_names=["c"])
    assert LmdbFile(tmp_path / "train.lmdb").name(0).endswith(r"train.lmdb:c/\x1b[2J\n.png")
