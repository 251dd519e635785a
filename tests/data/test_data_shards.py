"""Tar shards: written, read beside WebDataset's own library, the same batches everywhere, damage named and counted."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from data import build_loaders, check_dataset
from data.cache import Cache
from data.folders import DefaultCLS
from data.prepare import folder_to_lmdb, index_shards, main, to_shards, verify
from data.shard_index import ShardIndex, index_name
from data.shards import Shards


@pytest.fixture
def folders(make_folders):
    return make_folders({"train": {"ant": 21, "bee": 15}, "val": {"ant": 3, "bee": 4}}, image_format="JPEG")


@pytest.fixture
def packed(folders, tmp_path):
    """Return shards of five images."""
    to_shards(folders, tmp_path / "packed", images_per_shard=5)
    return tmp_path / "packed"


@pytest.fixture
def cache(tmp_path):
    return Cache.create(str(tmp_path / "cache"))


def contents(dataset):
    return Counter((dataset.read_bytes(index), int(dataset.labels[index])) for index in range(len(dataset)))


def epoch(config, *, world_size=1, number=0, start=0):
    """Return an epoch's batches as all ranks together see them."""
    shares = [
        list(build_loaders(config, rank=rank, world_size=world_size).train.iterate(number, start))
        for rank in range(world_size)
    ]
    return [
        (torch.stack([part.images for part in parts], 1).flatten(0, 1), torch.stack([p.targets for p in parts], 1))
        for parts in zip(*shares, strict=True)
    ]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for (images, targets), (other_images, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets.flatten(), other_targets.flatten())


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("source", ["folders", "lmdb"])
def test_shards_hold_the_images_of_their_source(folders, tmp_path, source):
    root = folders
    if source == "lmdb":
        root = tmp_path / "lmdb"
        folder_to_lmdb(folders, root)
    assert to_shards(root, tmp_path / "packed", images_per_shard=5) == {"train": 36, "val": 7}
    for split, num_shards in (("train", 8), ("val", 2)):
        ours, theirs = Shards(tmp_path / "packed", split=split), DefaultCLS(folders, split=split)
        assert contents(ours) == contents(theirs)
        assert ours.class_names == ["ant", "bee"]
        assert len(ours.index.shards) == num_shards
        assert [ours.load(index)[0].size for index in range(2)] == [(24, 24)] * 2
    assert ours.labels.tolist() == theirs.labels.tolist()  # test images keep their order
    assert Shards(tmp_path / "packed", split="train").labels.tolist() != sorted(21 * [0] + 15 * [1])
    assert verify(tmp_path / "packed", against=root, decodes=True) == ({"train": 36, "val": 7}, [])


def test_webdataset_reads_what_we_write(packed):
    webdataset = pytest.importorskip("webdataset")
    samples = webdataset.WebDataset(
        [str(path) for path in sorted(packed.glob("train-*.tar"))], shardshuffle=False
    ).decode("pil")
    ours = Shards(packed, split="train")
    count = 0
    for index, sample in enumerate(samples):
        image, label = ours.load(index)
        assert np.array_equal(np.asarray(sample["jpg"]), np.asarray(image))
        assert sample["cls"] == label
        assert ours.name(index).endswith(f":{sample['__key__']}.jpg")
        count += 1
    assert count == len(ours) == 36


@pytest.mark.parametrize("kind", ["cls", "json", "txt"])
def test_we_read_what_webdataset_writes(folders, tmp_path, cache, kind):
    webdataset = pytest.importorskip("webdataset")
    theirs = DefaultCLS(folders, split="train")
    (tmp_path / "theirs").mkdir()
    pattern = str(tmp_path / "theirs" / "imagenet-train-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
        for index in range(len(theirs)):
            label = int(theirs.labels[index])
            value = {"cls": label, "json": {"label": label, "caption": "a.b"}, "txt": str(label)}[kind]
            # a name of more than 100 characters goes into a header of its own
            writer.write({"__key__": f"n{'0' * 120}/{index:04d}", "jpg": theirs.read_bytes(index), kind: value})
    ours = Shards(tmp_path / "theirs", split="train", cache=cache)
    assert len(ours.index.shards) == 4
    assert [ours.read_bytes(index) for index in range(36)] == [theirs.read_bytes(index) for index in range(36)]
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert ours.class_names == ["0", "1"]


@pytest.mark.parametrize("sampler", ["naive", "ra"])
def test_batches_depend_on_neither_workers_nor_processes_nor_where_an_epoch_resumes(packed, make_config, sampler):
    def config(**entries):
        return make_config(packed, type="Shards", sampler=sampler, **entries)

    whole = epoch(config(batch_size=4), number=1)
    assert len(whole) == 9
    for workers, world_size, start in ((2, 1, 0), (4, 1, 5), (2, 2, 3), (0, 2, 8), (0, 1, 4)):
        settings = config(batch_size=4 // world_size, workers=workers)
        assert_same(epoch(settings, world_size=world_size, number=1, start=start), whole[start:])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (3, 0)])
def test_every_image_comes_once_an_epoch(packed, make_config, pixels, world_size, workers):
    config = make_config(packed, type="WebDataset", batch_size=2, workers=workers, drop_last=False)
    config.data.train_transforms = config.data.test_transforms
    seen = {
        number: Counter(
            image.numpy().tobytes()
            for batch, _ in epoch(config, world_size=world_size, number=number)
            for image in batch
        )
        for number in range(2)
    }
    assert seen[0] == seen[1]
    assert len(seen[0]) == 36
    assert set(seen[0].values()) == {1}


def test_the_shuffle_follows_seed_and_epoch(packed, make_config):
    first = torch.cat([targets.flatten() for _, targets in epoch(make_config(packed, type="Shards"))])
    other_seed = make_config(packed, type="Shards")
    other_seed.seed = 7
    others = [epoch(make_config(packed, type="Shards"), number=1), epoch(other_seed)]
    for other in others:
        assert not torch.equal(torch.cat([targets.flatten() for _, targets in other]), first)


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_cut_short_is_named_and_its_lost_images_are_counted(packed, make_config, workers, caplog):
    shard = packed / "train-000003.tar"
    cut(shard, 3000)  # two images of five
    dataset = Shards(packed, split="train")
    assert f"{shard} is cut short: 3000 of" in caplog.text
    config = make_config(packed, type="Shards", batch_size=4, workers=workers)
    batches = list(build_loaders(config, rank=0, world_size=1).train.iterate(0))
    unreadable = {name: cause for batch in batches for name, cause in batch.unreadable.items()}
    start = int(dataset.index.first_images[3])
    lost = [index for index in range(start, start + 5) if sum(dataset.index.place(index)[1:]) > 3000]
    assert 0 < len(lost) < 5
    assert set(unreadable) == {dataset.name(index) for index in lost}
    assert all(name.startswith(f"{shard}:") and "cut short" in cause for name, cause in unreadable.items())
    assert sum(len(batch.targets) for batch in batches) == 36


def test_a_shard_that_vanishes_is_counted_too(packed, make_config):
    loader = build_loaders(make_config(packed, type="Shards"), rank=0, world_size=1).test
    (packed / "val-000001.tar").unlink()
    unreadable = [name for batch in loader.iterate() for name in batch.unreadable]
    assert len(unreadable) == 2
    assert all(name.startswith(f"{packed}/val-000001.tar:byte ") for name in unreadable)


@pytest.mark.parametrize("damage", ["header", "end", "text", "html"])
def test_a_damaged_shard_without_an_index_is_refused_by_name(packed, cache, damage):
    for path in packed.glob("*-index*"):
        path.unlink()
    shard = packed / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        third = archive.getmembers()[4]
    if damage == "header":
        data[third.offset + 10] ^= 1  # `tarfile` would take this for the end
    elif damage == "end":
        del data[third.offset_data + 100 :]
    else:
        data = b"x" * 5000 if damage == "text" else b"<html>not found</html>"
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-000002\.tar is damaged, or is no tar file"):
        Shards(packed, split="train", cache=cache)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x", "b.jpg": b"y", "b.cls": b"0"}, r"train-0\.tar:a: no class index beside the image"),
        ({"a.jpg": b"x", "a.txt": b"a dog"}, r"train-0\.tar:a\.txt gives no class index, but b'a dog'"),
        ({"a.jpg": b"x", "a.json": b'{"caption": 3}'}, r"train-0\.tar:a\.json gives no class index"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, r"train-0\.tar:a\.cls: the label is -1"),
        ({"a.cls": b"1"}, "the 1 train shards hold no image"),
    ],
)
def test_samples_without_a_class_index_are_refused(tmp_path, cache, members, message):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, split="train", cache=cache)


def test_an_index_is_made_once_and_again_when_a_shard_changes(tmp_path, cache, monkeypatch):
    write_tar(tmp_path / "val-0.tar", {"a.jpg": b"x", "a.cls": b"3"})
    assert Shards(tmp_path, split="val", cache=cache).labels.tolist() == [3]
    with monkeypatch.context() as patch:
        patch.setattr("data.shards.index_shard", lambda *_, **__: pytest.fail("read again"))
        assert Shards(tmp_path, split="val", cache=cache).labels.tolist() == [3]
    (tmp_path / "classes.json").write_text(json.dumps([*"abcd"]))
    assert Shards(tmp_path, split="val", cache=cache).class_names == [*"abcd"]
    write_tar(tmp_path / "val-0.tar", {"a.jpg": b"x", "a.cls": b"4"})
    assert Shards(tmp_path, split="val", cache=cache).labels.tolist() == [4]
    write_tar(tmp_path / "val-1.tar", {"a.jpg": b"x", "a.cls": b"5"})
    assert Shards(tmp_path, split="val", cache=cache).labels.tolist() == [4, 5]


def test_an_index_of_other_shards_is_refused(packed):
    (packed / "train-000001.tar").rename(packed / "train-000009.tar")
    with pytest.raises(ValueError, match=r"1 shards are missing \(train-000001\.tar\).*data\.prepare index"):
        Shards(packed, split="train")
    (packed / "train-000009.tar").unlink()
    write_tar(packed / "train-000001.tar", {"a.jpg": b"x" * 100_000, "a.cls": b"0"})
    with pytest.raises(ValueError, match="1 shards are longer than in the index"):
        Shards(packed, split="train")
    index_shards(packed)
    assert len(Shards(packed, split="train")) == 32


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", ".hidden.tar", "a/b.tar"])
def test_an_index_that_names_files_elsewhere_is_refused(packed, name):
    path = packed / index_name("train")
    index = ShardIndex.load(path)
    object.__setattr__(index.shards[0], "name", name)
    index.save(path)
    with pytest.raises(ValueError, match="names shards outside its folder"):
        ShardIndex.load(path)


@pytest.mark.parametrize("place", [(0, 10), (600, 10**12), (-5, 10), (512, -1)])
def test_an_index_that_points_outside_a_shard_is_refused(packed, place):
    path = packed / index_name("val")
    index = ShardIndex.load(path)
    index.offsets[0], index.sizes[0] = place
    index.save(packed / "other")
    (packed / "other").replace(path)
    with pytest.raises(ValueError, match="places image 0 outside it"):
        Shards(packed, split="val").read_bytes(0)


@pytest.mark.parametrize("label", [-1, 10**9])
def test_an_index_with_impossible_classes_is_refused(packed, label):
    path = packed / index_name("val")
    index = ShardIndex.load(path)
    index.labels[1] = label
    index.save(packed / "other")
    (packed / "other").replace(path)
    with pytest.raises(ValueError, match=r"val-index\.safetensors: .*class index"):
        Shards(packed, split="val")


@pytest.mark.parametrize("damage", ["cut", "text"])
def test_a_damaged_index_is_refused(packed, damage):
    path = packed / index_name("val")
    path.write_bytes(path.read_bytes()[:-8] if damage == "cut" else b"no index")
    with pytest.raises(ValueError, match=r"val-index\.safetensors is damaged"):
        Shards(packed, split="val")


def test_what_is_no_folder_of_shards_is_named(two_classes, make_config):
    with pytest.raises(ValueError, match=r"holds no shards such as train-000000\.tar, but train, val"):
        check_dataset(make_config(two_classes, type="Shards"))
    with pytest.raises(ValueError, match="only shards are read from an address"):
        check_dataset(make_config("http://localhost:1/set"))


def test_writing_resumes_after_an_interruption(folders, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["shards", str(folders), str(whole), "--images", "5"]) == 0
    read = DefaultCLS.read_bytes
    reads = []

    def interrupted(self, index):
        reads.append(index)
        if len(reads) == 13:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(DefaultCLS, "read_bytes", interrupted)
    assert main(["shards", str(folders), str(out), "--images", "5"]) == 130
    assert sorted(path.name for path in out.iterdir()) == ["train-000000.tar", "train-000001.tar"]
    reads.append(None)
    (out / ".train-000002.tar.00000000.part").write_bytes(b"left by a kill")
    assert main(["shards", str(folders), str(out), "--images", "5"]) == 0
    assert len(reads) - 14 == 36 - 10 + 7  # images of shards that are there are not read again
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert main(["shards", str(folders), str(out), "--images", "4"]) == 2
    assert "train-000000.tar holds other images than would be written there; add --force" in capsys.readouterr().err
    assert main(["shards", str(folders), str(out), "--images", "5", "--seed", "1"]) == 2
    assert main(["shards", str(folders), str(out), "--images", "5", "--seed", "1", "--force"]) == 0
    assert main(["verify", str(out), "--against", str(folders), "--decode"]) == 0


def test_verify_finds_what_differs(folders, packed, capsys):
    data = bytearray((packed / "train-000000.tar").read_bytes())
    data[600] ^= 1
    (packed / "train-000000.tar").write_bytes(data)
    (folders / "val/ant/image 36.JPEG").write_bytes(b"other")
    assert main(["verify", str(packed), "--against", str(folders)]) == 1
    message = capsys.readouterr().err
    assert "train-000000.tar: the content differs from what was written (SHA-256)" in message
    assert "val-000000.tar:000000000-image_36.jpg: the image or its class differs from" in message
    assert "3 problems" in message


def test_a_fingerprint_is_that_of_the_shards_wherever_they_lie(packed, tmp_path, cache):
    first = Shards(packed, split="train").fingerprint()
    for path in packed.glob("*-index*"):
        path.unlink()
    packed.rename(tmp_path / "elsewhere")
    assert Shards(tmp_path / "elsewhere", split="train", cache=cache).fingerprint() == first
    (tmp_path / "elsewhere" / "train-000007.tar").unlink()
    assert Shards(tmp_path / "elsewhere", split="train", cache=cache).fingerprint() != first
