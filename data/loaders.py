"""Batches for training and testing, the same for any number of workers and wherever an epoch is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch
from torch import multiprocessing
from torch.utils.data import DataLoader

from configs.schema import Config
from util.cores import count_cores
from util.errors import RunError

from .base import ImageDataset
from .datasets import open_datasets
from .samplers import EvaluationSampler, TrainSampler
from .samples import Batch, SampleReader, collate
from .transforms import build_transform, takes_arrays

__all__ = ["Loaders", "TestLoader", "TrainLoader", "build_loaders", "describe_workers", "worker_failures"]

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30
NUM_SAMPLED = 256  # images of a split whose contents are compared at a resume
WORKERS_ENTRY = "trainer.data.num_workers_per_gpu"
CORES_PER_WORKER = 4  # on a CPU, where workers share the cores with the training: its images take far longer
PIPES_PER_WORKER = 8  # those that a worker is started with, and the batches on their way from it

SIGNS_OF_FAILURE = ("DataLoader worker", "shared memory", "unable to mmap", "ancdata")  # texts of PyTorch's errors
LACKS = (  # signs in an error's text, what they tell
    (("Too many open files", "ancdata"), "too many files are open: raise the limit with `ulimit -n 65536`"),
    (
        ("shared memory", "Bus error", "No space left", "Read-only file system"),
        "shared memory (/dev/shm) is full, small or read-only: enlarge it (docker run --shm-size=8g, "
        "mount -o remount,rw,size=8G /dev/shm)",
    ),
    (("Killed", "Cannot allocate memory", "unavailable"), "memory probably ran out (see dmesg): free some"),
)


class TrainLoader:
    """Training batches of one process.

    Args:
        dataset: The training split.
        config: The resolved run.
        rank: This process.
        world_size: Number of processes.
        device_type: Where the batches go; memory is pinned only for ``cuda``.

    Attributes:
        dataset: The training split.
        num_workers: Processes that read images.
        fingerprint: Hash of the training set: size, class names, image names and labels.
        smallest_batch: Images in the last batch of an epoch, the smallest one.
        unreadable: Names of the images that this process could not read so far.

    Raises:
        ValueError: If the images do not make one batch.
    """

    def __init__(
        self, dataset: ImageDataset, config: Config, *, rank: int, world_size: int, device_type: str = "cpu"
    ) -> None:
        options = config.trainer.data
        batch_size = options.batch_size_per_gpu
        assert batch_size is not None, "a resolved configuration has it"
        self.dataset = dataset
        self.fingerprint = dataset.fingerprint()
        self._sampler = TrainSampler(
            len(dataset),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            sampler=config.data.sampler,
            num_repeats=config.data.num_repeats,
            drop_last=options.drop_last,
            block_sizes=dataset.block_sizes,
        )
        if len(self._sampler) == 0:
            raise ValueError(
                f"{dataset.source}: {len(dataset)} images make no batch of {batch_size} on each of {world_size} "
                "processes; lower batch_size, or set trainer.data.drop_last=False"
            )
        self.smallest_batch = self._sampler.smallest_batch
        is_simple = config.data.loader_type.startswith("simplejpeg") and config.data.channels == 3
        dataset.as_array = is_simple and takes_arrays(config.data.train_transforms)
        reader = _reader(dataset, config, is_training=True)
        self._batches = _Batches(reader, self._sampler, config, device_type=device_type, rank=rank)
        self.num_workers = self._batches.num_workers
        self.unreadable: set[str] = set()

    def __len__(self) -> int:
        """Return the number of batches of an epoch, on this process as on every other."""
        return len(self._sampler)

    def iterate(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: From 0.
            start_batch: Batches to leave out; their images are not read.

        Raises:
            ValueError: If the data set turns out to be broken, or the epoch has fewer batches.
            RunError: If a worker dies.
        """
        self._sampler.set_position(epoch, start_batch)
        return map(self._with_warnings, self._batches)

    def _with_warnings(self, batch: Batch) -> Batch:
        """Log why images of a batch are left out, once for each."""
        for name, cause in batch.unreadable.items():
            if name not in self.unreadable:
                self.unreadable.add(name)
                logger.warning("%s: unreadable image (%s), another takes its place", name, cause)
        return batch


class TestLoader:
    """Test batches of one process: images ``rank``, ``rank + world_size``, ..., with nothing added or left out.

    Args:
        dataset: The test split.
        config: The resolved run.
        rank: This process.
        world_size: Number of processes.
        device_type: Where the batches go; memory is pinned only for ``cuda``.

    Attributes:
        dataset: The test split.
        num_workers: Processes that read images.
        num_images: Size of the test set, over all processes.
    """

    def __init__(
        self, dataset: ImageDataset, config: Config, *, rank: int, world_size: int, device_type: str = "cpu"
    ) -> None:
        batch_size = config.trainer.data.batch_size_per_gpu_test
        self.dataset = dataset
        self.num_images = len(dataset)
        self._sampler = EvaluationSampler(self.num_images, batch_size=batch_size, rank=rank, world_size=world_size)
        reader = _reader(dataset, config, is_training=False)
        self._batches = _Batches(reader, self._sampler, config, device_type=device_type, rank=rank)
        self.num_workers = self._batches.num_workers

    def __len__(self) -> int:
        """Return the number of batches of this process; others may have one more or less."""
        return len(self._sampler)

    def iterate(self) -> Iterator[Batch]:
        """Yield every batch.

        Raises:
            ValueError: If the data set turns out to be broken.
            RunError: If a worker dies.
        """
        return iter(self._batches)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaders:
    """The loaders of a run; ``train`` is None in the test modes."""

    train: TrainLoader | None
    test: TestLoader
    class_names: list[str]

    def contents(self) -> str:
        """Return a hash of the contents of up to 256 images of each split, evenly spaced; it reads them."""
        digest = hashlib.sha256()
        for dataset in (self.test.dataset, *([self.train.dataset] if self.train else [])):
            for content in dataset.content_hashes(NUM_SAMPLED):
                digest.update(content)
        return digest.hexdigest()


def build_loaders(
    config: Config, *, rank: int, world_size: int, device_type: str = "cpu", first: ImageDataset | None = None
) -> Loaders:
    """Open and check the data set, and build the loaders of one process.

    Args:
        config: The resolved run.
        rank: This process.
        world_size: Number of processes.
        device_type: Where the batches go.
        first: The split of `open_first`, where it is open already.

    Raises:
        ValueError: If the data set is missing, laid out otherwise, or has other classes than the configuration.
    """
    train, test = open_datasets(config, first=first)
    train_loader = None
    if train is not None:
        train_loader = TrainLoader(train, config, rank=rank, world_size=world_size, device_type=device_type)
    test_loader = TestLoader(test, config, rank=rank, world_size=world_size, device_type=device_type)
    return Loaders(train=train_loader, test=test_loader, class_names=(train or test).class_names)


@contextlib.contextmanager
def worker_failures(num_workers: int, *, rank: int | None = None) -> Iterator[None]:
    """Turn the errors that PyTorch raises when a data worker dies into one that names the way out.

    PyTorch raises them wherever the main process happens to be, so that a loop over batches belongs inside.

    Args:
        num_workers: Workers of this process.
        rank: This process, where it is one of several.

    Raises:
        RunError: In place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        is_explained = isinstance(error, RunError)
        if is_explained or not any(sign in str(error) for sign in SIGNS_OF_FAILURE):
            raise
        raise _explained(error, num_workers, rank) from error


def _explained(error: Exception, num_workers: int, rank: int | None) -> RunError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(dict.fromkeys((lines[0], lines[-1])))  # the worker, and the end of its traceback, if there is one
    place = "" if rank is None else f"on rank {rank} "
    lack = next((lack for signs, lack in LACKS if any(sign in text for sign in signs)), "if memory ran out, free some")
    return RunError(
        f"a data worker died {place}({text}); {lack}, or lower {WORKERS_ENTRY} (now {num_workers}); "
        "with 0 the main process reads and shows the cause"
    )


def _wanted_workers(config: Config, *, device_type: str) -> int:
    """Return the number of workers that the user has chosen, or as many of the recipe's as suit the process.

    Args:
        config: The resolved run.
        device_type: Where it computes: on a CPU that takes the cores itself, and a worker for several of them keeps up.
    """
    wanted = config.trainer.data.num_workers_per_gpu
    assert wanted is not None, "a resolved configuration has it"
    if WORKERS_ENTRY not in config.derived:
        return wanted
    cores = count_cores().count
    return min(wanted, max(1, cores if device_type == "cuda" else cores // CORES_PER_WORKER))


def describe_workers(config: Config, num_workers: int) -> str:
    """Return how many workers a loader has, and why, for the log."""
    wanted = config.trainer.data.num_workers_per_gpu
    reason = count_cores().reason if WORKERS_ENTRY in config.derived else f"{WORKERS_ENTRY} is set"
    return f"{num_workers} {'worker' if num_workers == 1 else 'workers'} (of {wanted} at most; {reason})"


def _check_resources(num_workers: int) -> None:
    """Raise an OSError where workers could not be started: PyTorch would fail halfway, and again as it cleans up."""
    multiprocessing.get_context().Semaphore()
    pipes: list[tuple[int, int]] = []
    try:
        pipes.extend(os.pipe() for _ in range(PIPES_PER_WORKER * num_workers))
    finally:
        for descriptor in itertools.chain.from_iterable(pipes):
            os.close(descriptor)


class _Batches:
    """A PyTorch loader that draws from no global generator, and whose errors name the way out."""

    def __init__(
        self,
        reader: SampleReader,
        sampler: TrainSampler | EvaluationSampler,
        config: Config,
        *,
        device_type: str,
        rank: int,
    ) -> None:
        self.rank = rank
        options = config.trainer.data
        # A worker reads whole batches.
        self.num_workers = min(_wanted_workers(config, device_type=device_type), len(sampler))
        self._loader = DataLoader(
            reader,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=options.pin_memory and device_type == "cuda",
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),
            persistent_workers=options.persistent_workers and self.num_workers > 0,
        )

    def __iter__(self) -> Iterator[Batch]:
        try:
            if self.num_workers > 0:
                _check_resources(self.num_workers)
            with worker_failures(self.num_workers, rank=self.rank):
                for batch, error in self._loader:
                    if error:
                        raise ValueError(error)
                    yield batch
        except KeyboardInterrupt:
            _kill_workers()
            raise
        except (OSError, EOFError) as error:
            # Of pipes and shared memory: a worker hands on what goes wrong with a file as text.
            if self.num_workers == 0:
                raise
            raise _explained(error, self.num_workers, self.rank) from error


def _reader(dataset: ImageDataset, config: Config, *, is_training: bool) -> SampleReader:
    steps = config.data.train_transforms if is_training else config.data.test_transforms
    num_classes = config.nb_classes if config.data.nb_classes is None else config.data.nb_classes
    transform = build_transform(steps, channels=config.data.channels)
    return SampleReader(dataset, transform, num_classes=num_classes, is_training=is_training)


def _kill_workers() -> None:
    """End this process's workers, of which one may hang in a read."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for each that dies
    for worker in multiprocessing.active_children():
        worker.kill()


def _outlive_signals(worker: int) -> None:
    """Keep a worker alive when a terminal or scheduler signals the whole process group.

    The main process decides what a signal means: it finishes its step and stops its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _exit_soon)


def _exit_soon(number: int, frame: FrameType | None) -> None:
    signal.alarm(GRACE_SECONDS)
