"""Batches are the same for any number of workers, after a resume, and whatever else draws random numbers."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import Batch, build_loaders, loaders, worker_failures
from data.prepare import folder_to_lmdb
from data.samplers import TrainSampler
from data.samples import MAX_REPLACEMENTS, SampleReader
from util.cores import Cores
from util.errors import RunError


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert one.unreadable == other.unreadable


@pytest.fixture(params=["DefaultCLS", "ImageFolderLMDB"])
def config_of(request, two_classes, tmp_path, make_config):
    root = two_classes
    if request.param == "ImageFolderLMDB":
        root = tmp_path / "packed"
        folder_to_lmdb(two_classes, root)
    return lambda **entries: make_config(root, type=request.param, **entries)


def test_batches_have_the_agreed_form(two_classes, make_config):
    loaders = build_loaders(make_config(two_classes), rank=0, world_size=1)
    batch = next(loaders.train.iterate(0))
    assert isinstance(batch, Batch)
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 32, 32), torch.float32)
    assert (batch.targets.shape, batch.targets.dtype) == ((4,), torch.int64)
    assert batch.unreadable == {}
    assert [len(batch.targets) for batch in loaders.test.iterate()] == [4, 3]


@pytest.mark.parametrize("is_persistent", [False, True], ids=["", "persistent"])
def test_workers_change_nothing(config_of, is_persistent):
    entries = {"persistent_workers": is_persistent}
    plain, parallel = (build_loaders(config_of(workers=workers, **entries), rank=0, world_size=1) for workers in (0, 2))
    for epoch in range(2):
        random.seed(epoch)
        torch.manual_seed(5)
        first = list(plain.train.iterate(epoch))
        torch.manual_seed(77)
        assert_same(list(parallel.train.iterate(epoch)), first)
        assert_same(list(parallel.test.iterate()), list(plain.test.iterate()))


@pytest.mark.parametrize(
    ("device_type", "cores", "expected"),
    [("cpu", 1, 1), ("cpu", 2, 1), ("cpu", 8, 2), ("cpu", 64, 8), ("cuda", 1, 1), ("cuda", 6, 6), ("cuda", 64, 8)],
)
def test_as_many_workers_as_suit_the_machine_unless_told(
    two_classes, make_config, monkeypatch, device_type, cores, expected
):
    monkeypatch.setattr(loaders, "count_cores", lambda: Cores(count=cores, reason="made up"))
    monkeypatch.setattr(TrainSampler, "__len__", lambda _: 100)
    counts, reasons = [], []
    for derived in ([loaders.WORKERS_ENTRY], []):
        config = make_config(two_classes, workers=8)
        config.derived = derived
        counts.append(build_loaders(config, rank=0, world_size=1, device_type=device_type).train.num_workers)
        reasons.append(loaders.describe_workers(config, counts[-1]))
    assert counts == [expected, 8]
    assert reasons == [
        f"{expected} worker{'s' if expected > 1 else ''} (of 8 at most; made up)",
        "8 workers (of 8 at most; trainer.data.num_workers_per_gpu is set)",
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", ["naive", "ra"])
def test_resume_within_an_epoch(two_classes, make_config, workers, sampler):
    config = make_config(two_classes, workers=workers, sampler=sampler)
    whole = list(build_loaders(config, rank=0, world_size=1).train.iterate(3))
    resumed = build_loaders(config, rank=0, world_size=1).train
    assert_same(list(resumed.iterate(3, start_batch=2)), whole[2:])
    assert list(resumed.iterate(3, start_batch=len(resumed))) == []
    with pytest.raises(ValueError, match="has 4 batches"):
        resumed.iterate(3, start_batch=5)


def test_a_resume_reads_no_skipped_image(two_classes, make_config, monkeypatch):
    read = []
    load = SampleReader.__getitems__
    monkeypatch.setattr(SampleReader, "__getitems__", lambda self, keys: read.extend(keys) or load(self, keys))
    loader = build_loaders(make_config(two_classes), rank=0, world_size=1).train
    list(loader.iterate(0, start_batch=3))
    assert len(read) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_leaves_no_trace(two_classes, make_config, workers):
    config = make_config(two_classes, workers=workers, persistent_workers=True)
    loader = build_loaders(config, rank=0, world_size=1).train
    expected = list(loader.iterate(1))
    next(loader.iterate(0))
    assert_same(list(loader.iterate(1)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_process_keeps_its_random_states(two_classes, make_config, workers):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    loaders = build_loaders(make_config(two_classes, workers=workers), rank=0, world_size=1)
    before = states()
    for _ in loaders.train.iterate(0):
        assert states() == before
    list(loaders.test.iterate())
    assert states() == before


def test_epochs_and_views_differ(two_classes, make_config):
    loader = build_loaders(make_config(two_classes), rank=0, world_size=1).train
    first, second = (torch.cat([batch.images for batch in loader.iterate(epoch)]) for epoch in range(2))
    assert not torch.equal(first, second)
    assert len({image.numpy().tobytes() for image in first}) == len(first)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_test_split_is_counted_once(two_classes, make_config, world_size):
    config = make_config(two_classes, batch_size=2)
    loaders = [build_loaders(config, rank=rank, world_size=world_size).test for rank in range(world_size)]
    batches = [list(loader.iterate()) for loader in loaders]
    assert [len(share) for share in batches] == [len(loader) for loader in loaders]
    targets = torch.cat([batch.targets for share in batches for batch in share])
    assert targets.bincount().tolist() == [4, 3]
    assert {loader.num_images for loader in loaders} == {7}


def test_total_batch_decides_not_the_number_of_processes(two_classes, make_config):
    whole = list(build_loaders(make_config(two_classes, batch_size=4), rank=0, world_size=1).train.iterate(0))
    config = make_config(two_classes, batch_size=2)
    shares = [list(build_loaders(config, rank=rank, world_size=2).train.iterate(0)) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(batch.images, torch.stack([part.images for part in parts], dim=1).flatten(0, 1))


def break_image(root: Path, split: str, class_name: str) -> Path:
    path = sorted((root / split / class_name).iterdir())[0]
    path.write_bytes(path.read_bytes()[:100])
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_image_is_replaced_and_reported(two_classes, make_config, workers):
    intact = list(build_loaders(make_config(two_classes), rank=0, world_size=1).train.iterate(0))
    broken = break_image(two_classes, "train", "ant")
    loader = build_loaders(make_config(two_classes, workers=workers, batch_size=1), rank=0, world_size=1).train
    first, second = list(loader.iterate(0)), list(loader.iterate(0))
    assert_same(first, second)
    intact = torch.cat([batch.images for batch in intact])
    reported = [list(batch.unreadable) for batch in first]
    assert [names for names in reported if names] == [[str(broken)]]
    for batch, names, image in zip(first, reported, intact, strict=False):
        assert torch.equal(batch.images[0], image) is (names == [])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_test_image_is_reported(config_of, two_classes, workers):
    broken = break_image(two_classes, "val", "bee")
    config = config_of(workers=workers)
    if config.data.type == "ImageFolderLMDB":
        folder_to_lmdb(two_classes, Path(config.data.root), is_forced=True)
    batches = list(build_loaders(config, rank=0, world_size=1).test.iterate())
    assert sum(len(batch.targets) for batch in batches) == 7
    assert torch.cat([batch.targets for batch in batches]).bincount().tolist() == [4, 3]
    names = [name for batch in batches for name in batch.unreadable]
    assert len(names) == 1
    assert names[0].endswith(f"bee/{broken.name}")


def test_missing_file_counts_as_unreadable(two_classes, make_config):
    loader = build_loaders(make_config(two_classes), rank=0, world_size=1).test
    gone = two_classes / "val" / "ant" / "image 17.png"
    gone.unlink()
    assert [name for batch in loader.iterate() for name in batch.unreadable] == [str(gone)]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error(two_classes, make_config, workers):
    loader = build_loaders(make_config(two_classes, workers=workers), rank=0, world_size=1).train
    for path in (two_classes / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"^.*train: {MAX_REPLACEMENTS} images drawn one after another cannot be read"
    ):
        next(loader.iterate(0))


@pytest.mark.parametrize("is_persistent", [False, True], ids=["", "persistent"])
def test_dead_worker_is_one_clean_error_and_leaves_no_orphan(two_classes, make_config, monkeypatch, is_persistent):
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(Image.Image, "convert", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    loader = build_loaders(make_config(two_classes, workers=2, persistent_workers=is_persistent), rank=0, world_size=1)
    with pytest.raises(RunError, match=r"a data worker died .*trainer\.data\.num_workers_per_gpu \(now 2\)"):
        list(loader.train.iterate(0))
    del loader
    deadline = time.monotonic() + 20
    while set(multiprocessing.active_children()) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(multiprocessing.active_children()) == before


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="elsewhere"), worker_failures(2):
        raise RuntimeError("elsewhere")


def test_workers_outlive_signals_to_the_group(two_classes, make_config):
    loader = build_loaders(make_config(two_classes, workers=2), rank=0, world_size=1).train
    expected = list(loader.iterate(0))
    known = set(multiprocessing.active_children())
    batches = loader.iterate(0)
    received = [next(batches), next(batches)]  # one of each worker: both have started
    workers = set(multiprocessing.active_children()) - known
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert_same([*received, *batches], expected)


def test_torchvision_decodes_the_same_batches_of_lossless_images(two_classes, make_config):
    batches = [
        list(build_loaders(make_config(two_classes, loader_type=kind), rank=0, world_size=1).train.iterate(0))
        for kind in ("pil", "torchvision")
    ]
    assert_same(*batches)


def test_fingerprint_is_stable_and_notices_a_change(config_of, two_classes):
    first = build_loaders(config_of(), rank=0, world_size=1).train.fingerprint
    assert build_loaders(config_of(workers=2), rank=1, world_size=2).train.fingerprint == first
    (two_classes / "train/ant/image 0.png").rename(two_classes / "train/ant/other.png")
    if config_of().data.type == "DefaultCLS":
        assert build_loaders(config_of(), rank=0, world_size=1).train.fingerprint != first
