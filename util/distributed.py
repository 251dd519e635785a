"""The process group: NCCL between GPUs, gloo between CPUs, none at all for one process."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .alarm import Alarm
from .cores import count_cores, limit_threads
from .launch import Launch

__all__ = ["Process", "choose_device", "init_process", "is_lost_process", "lost_in_nccl", "open_store"]

# Texts of gloo's and NCCL's errors; gloo's have no class of their own.
SIGNS_OF_LOSS = (
    "gloo/transport",
    "Connection closed by peer",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
)

# NCCL kills a process at its time-out, without a word of ours: it is to be later than the alarm.
NCCL_GRACE_SECONDS = 120
# NCCL's flight recorder: the last collectives, in which ranks that left each other can be told apart.
NCCL_VARIABLES = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process(Launch):
    """One of the processes of a run: its place, where it computes, and its exchange with the others.

    Every collective below must be reached by all processes; with one process it returns what it was given.

    Attributes:
        device: Where this process computes.
        backend: ``nccl``, ``gloo``, or ``none`` for one process.
        alarm: Ends the process where it waits for others in vain, which only gloo does by itself.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"
    alarm: Alarm | None = field(default=None, compare=False)

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group."""
        return self.world_size > 1

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of a wait for other processes, or for a GPU that waits for them."""
        return contextlib.nullcontext() if self.alarm is None else self.alarm.waiting()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over processes, taken in float64: counts stay exact."""
        if not self.is_distributed:
            return [float(value) for value in values]
        with self.waiting():
            return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over processes, in place, and return it."""
        if self.is_distributed:
            dist.all_reduce(values)
        return values

    def broadcast_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Overwrite a tensor with that of rank 0, in place, and return it."""
        if self.is_distributed:
            dist.broadcast(values, src=0)
        return values

    def broadcast_object(self, value: T, *, source: int = 0) -> T:
        """Return the value of the process ``source``; it must pickle."""
        if not self.is_distributed:
            return value
        box = [value]
        with self.waiting():
            dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; they must pickle."""
        if not self.is_distributed:
            return [value]
        box: list[Any] = [None] * self.world_size
        with self.waiting():
            dist.all_gather_object(box, value)
        return box

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function only on rank 0 and return its result on every process; it must pickle.

        Raises:
            ValueError: On every process, if the function raised one on rank 0.
            OSError: The same.
        """
        result, failure = None, None
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as error:
                failure = error
        if self.is_distributed:
            kind = OSError if isinstance(failure, OSError) else ValueError
            told = self.broadcast_object(None if failure is None else (kind, str(failure)))
            failure = failure or (told and told[0](told[1]))
        if failure is not None:
            raise failure
        return self.broadcast_object(result)  # type: ignore[return-value]


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

    Args:
        name: ``auto`` (a GPU where there is one), ``cuda`` or ``cpu``.
        local_rank: Number of this process on its node; it gets the GPU of that number.

    Raises:
        ValueError: If there is no such GPU.
    """
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and num_devices == 0):
        return torch.device("cpu")
    if num_devices == 0:
        raise ValueError("trainer.device is cuda but PyTorch finds no GPU; use trainer.device=cpu")
    if local_rank >= num_devices:
        raise ValueError(
            f"process {local_rank} of this node has no GPU of its own: {num_devices} found; "
            f"start {num_devices} per node, or use trainer.device=cpu"
        )
    return torch.device("cuda", local_rank)


def open_store(launch: Launch, *, timeout_seconds: float) -> dist.Store:
    """Return the key-value store in which the processes meet.

    Raises:
        ValueError: If ``launch.dist_url`` is malformed, or the launcher's variables are missing.
        RuntimeError: If the others do not come within the timeout.
    """
    timeout = timedelta(seconds=timeout_seconds)
    meeting = dist.rendezvous(launch.dist_url, launch.rank, launch.world_size, timeout=timeout)
    store, _, _ = next(meeting)
    store.set_timeout(timeout)
    return dist.PrefixStore(f"attempt{_attempt()}", store)


def _attempt() -> str:
    """Return the number of times that the launcher has restarted this run.

    torchrun's own store outlives a restart, with the addresses of processes that are gone. Its agents on several nodes
    may count differently; told to share no store, they have a fresh one each time.

    Raises:
        ValueError: If processes on several nodes would meet in the store of before.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return count
    if count != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun restarts processes on several nodes where those before them met: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, and --rdzv-backend=c10d"
        )
    return "0"


@contextlib.contextmanager
def init_process(launch: Launch, *, device: str = "auto", timeout_seconds: float = 1800) -> Iterator[Process]:
    """Join the process group for the time of the context.

    After an error the group lives until the process ends: destroying it could wait for processes that are gone.

    Args:
        launch: The place of this process.
        device: ``auto``, ``cuda`` or ``cpu``.
        timeout_seconds: A collective that waits longer for the others gives up.

    Yields:
        This process.
    """
    chosen = choose_device(device, local_rank=launch.local_rank)
    limit_threads(count_cores())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend, alarm = "none", None
    if launch.world_size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if backend == "nccl":
            alarm = Alarm(timeout_seconds, lambda: f"another process of the run was lost: {lost_in_nccl(launch.rank)}")
            timeout_seconds += NCCL_GRACE_SECONDS
            for name, value in NCCL_VARIABLES.items():
                os.environ.setdefault(name, value)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", open_store(launch, timeout_seconds=timeout_seconds)),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    yield Process(**asdict(launch), device=chosen, backend=backend, alarm=alarm)
    if backend != "none":
        # References to the group keep gloo's threads alive, and one that is busy while Python exits aborts the process.
        gc.collect()
        dist.destroy_process_group()


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error is what a collective raises when another process is gone or does not come."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_LOSS)
    )


def lost_in_nccl(rank: int, folder: Path | None = None) -> str:
    """Return the end of a message about a wait for other GPUs that took too long: where the flight record is.

    Args:
        rank: This process.
        folder: Takes the record; a new folder for temporary files when None.
    """
    waited = "it did not answer within trainer.timeout_seconds"
    try:
        # Others may write to the folder for temporary files: a name there must not be known before.
        place = Path(tempfile.mkdtemp(prefix="nccl-")) if folder is None else folder
        path = place / f"nccl_flight_record_rank{rank}.pickle"
        path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
    except (AttributeError, OSError, RuntimeError) as error:
        return f"{waited} (no flight record: {' '.join(str(error).split())})"
    return f"{waited} (NCCL's flight record: {path})"
