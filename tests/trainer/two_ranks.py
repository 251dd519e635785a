"""Scenarios that two processes play together; each returns what the tests look at."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trainer_cases import CONFIG, TINY_NETWORK, epoch_records, short_run, write_class_folders

from configs import load_config
from trainer import Run, build_run
from trainer.batchnorm import batch_norm_statistics, equalise_statistics
from trainer.checkpoint import CheckpointStore, load_training_checkpoint
from trainer.train import train
from util import errors
from util.distributed import Process, init_process
from util.errors import RunError, exit_code_of
from util.launch import Launch

SCENARIOS: dict[str, Callable[[Process, Path, Path], Any]] = {}


def scenario(function: Callable[[Process, Path, Path], Any]) -> Callable[[Process, Path, Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def run_rank(rank: int, folder: Path, data: Path) -> None:
    """Play every scenario in turn and leave the results in a file."""
    torch.set_num_threads(1)
    results = {}
    launch = Launch(rank=rank, local_rank=rank, world_size=2, dist_url=f"file://{folder}/store")
    with init_process(launch, device="cpu", timeout_seconds=60) as process:
        for name, play in SCENARIOS.items():
            results[name] = play(process, folder / name, data)
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    results["threads"] = [name for name in names if "gloo" in name]
    torch.save(results, folder / f"rank{rank}.pt")


def run_rank_that_dies(rank: int, folder: Path, data: Path) -> None:
    """Train; rank 1 is gone in the middle of the second epoch."""
    torch.set_num_threads(1)
    launch = Launch(rank=rank, local_rank=rank, world_size=2, dist_url=f"file://{folder}/store")
    with init_process(launch, device="cpu", timeout_seconds=60) as process:
        run = build(process, folder / "runs", data)
        during_step(run, 5, lambda images: os._exit(9) if rank == 1 else images)
        try:
            train(run)
        except RunError as error:
            (folder / "message.txt").write_text(str(error))
            os._exit(error.exit_code)


def run_rank_that_hangs(rank: int, folder: Path, data: Path) -> None:
    """Train; rank 1 stops in the middle of the second epoch, and neither dies nor answers."""
    torch.set_num_threads(1)
    launch = Launch(rank=rank, local_rank=rank, world_size=2, dist_url=f"file://{folder}/store")

    def stop(images: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return images

    def body(launch: Launch) -> int:
        with init_process(launch, device="cpu", timeout_seconds=15) as process:
            run = build(process, folder / "runs", data)
            during_step(run, 5, stop)
            return train(run)

    with (folder / f"stderr{rank}.txt").open("w") as stderr, contextlib.redirect_stderr(stderr):
        code = exit_code_of(lambda: launch, body)
    os._exit(code)


def run_rank_whose_worker_dies(rank: int, folder: Path, data: Path) -> None:
    """Train with workers; one of rank 1's is killed in the middle of the second epoch."""
    torch.set_num_threads(1)
    launch = Launch(rank=rank, local_rank=rank, world_size=2, dist_url=f"file://{folder}/store")

    def kill_worker(images: torch.Tensor) -> torch.Tensor:
        workers = [worker.pid for worker in multiprocessing.active_children()]
        (folder / f"workers{rank}.txt").write_text(" ".join(map(str, workers)))
        if rank == 1:
            os.kill(workers[0], signal.SIGKILL)
        return images

    def body(launch: Launch) -> int:
        with init_process(launch, device="cpu", timeout_seconds=60) as process:
            run = build(process, folder / "runs", data, "trainer.data.num_workers_per_gpu=1", "batch_size=4")
            during_step(run, 8, kill_worker)
            return train(run)

    with (folder / f"stderr{rank}.txt").open("w") as stderr, contextlib.redirect_stderr(stderr):
        code = exit_code_of(lambda: launch, body)
    sys.exit(code)


def build(process: Process, runs: Path, data: Path, *more: str) -> Run:
    config = load_config(CONFIG, short_run(data, runs, *TINY_NETWORK, *more), world_size=2)
    return build_run(config, process)


def during_step(run: Run, number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put the images of a step, counted from 1, through a function."""
    compute_loss = run.stepper.compute_loss

    def changed(images, targets):
        return compute_loss(change(images) if run.state.iteration + 1 == number else images, targets)

    run.stepper.compute_loss = changed


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.network.named_parameters()}


def kill_self(images: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return images


@scenario
def collectives(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    caught = ""
    try:
        process.on_first(lambda: int("no number"))
    except ValueError as error:
        caught = str(error)
    return {
        "sum": process.sum([2.0**53 - 1, process.rank]),
        "gathered": process.gather_objects({"rank": process.rank}),
        "broadcast": process.broadcast_object(f"from {process.rank}", source=1),
        "first": process.on_first(lambda: process.rank),
        "caught": caught,
    }


@scenario
def statistics(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    found = {}
    for kind in ("reduce", "broadcast", ""):
        network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(2))
        for value in batch_norm_statistics(network).values():
            value.fill_(1 + 2 * process.rank)
        equalise_statistics(network, kind, process)
        found[kind] = [network[0].running_mean, network[1].running_var]
    return found


@scenario
def nan_on_one_rank(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    run = build(process, runs, data)
    before: dict[str, torch.Tensor] = {}
    kept = {}

    def spoil(images: torch.Tensor) -> torch.Tensor:
        before.update(weights(run))
        return images * float("nan") if process.rank == 1 else images

    def look(images: torch.Tensor) -> torch.Tensor:
        kept["same"] = all(torch.equal(value, before[name]) for name, value in weights(run).items())
        return images

    during_step(run, 2, spoil)
    during_step(run, 3, look)
    code = train(run)
    finite = all(value.isfinite().all() for value in run.network.state_dict().values())
    return {"code": code, "skipped": run.state.skipped_steps, "finite": finite, "net": weights(run), **kept}


@scenario
def deferred(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    """As on GPUs: a NaN on rank 1, then a signal to rank 0, both settled later; rank 1 waits for its data."""
    run = build(process, runs, data, "batch_size=4")  # 6 steps an epoch
    run.stepper.is_deferred = True
    iterate = run.loaders.train.iterate

    def dawdle(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in iterate(*arguments, **options):
            time.sleep(0.3 if process.rank == 1 else 0.0)
            yield batch

    run.loaders.train.iterate = dawdle
    compute_loss = run.stepper.compute_loss
    kept: list[dict[str, torch.Tensor]] = []

    def spoil(images, targets):
        step = run.state.iteration + 1
        kept.append(weights(run))
        if (step, process.rank) == (9, 0):
            kill_self(images)
        return compute_loss(images * (float("nan") if (step, process.rank) == (3, 1) else 1.0), targets)

    run.stepper.compute_loss = spoil
    code = train(run)
    is_same = all(torch.equal(value, kept[3][name]) for name, value in kept[2].items())
    facts = {"code": code, "iter": run.state.iteration, "skipped": run.state.skipped_steps, "same": is_same}
    return {**facts, "net": weights(run), "slowest": epoch_records(run.folder)[0]["slowest_rank"]}


@scenario
def signal_on_one_rank(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    run = build(process, runs, data)
    during_step(run, 2, kill_self if process.rank == 1 else nn.Identity())
    code = train(run)
    return {"code": code, "iter": load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"]}


@scenario
def resume(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    """Every rank keeps its own statistics between tests, which a resume must bring back."""
    more = ("trainer.dist_BN=reduce", "test_start_epoch=0")
    whole = build(process, runs, data, *more)
    train(whole)
    stopped = build(process, runs, data, *more)
    during_step(stopped, 2, kill_self if process.rank == 0 else nn.Identity())
    train(stopped)
    resumed = build(process, runs, data, *more, f"trainer.resume_dir={stopped.folder}")
    train(resumed)
    return {
        name: [run.network.state_dict(), run.average.module.state_dict(), run.state.scores]
        for name, run in (("whole", whole), ("resumed", resumed))
    }


@scenario
def smaller_world(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    """Two ranks stop in an epoch; rank 0 ends the run alone. Without BatchNorm and mixup, this is the same training."""
    network = ("model.name=timm_vit_tiny_patch16_224", "model.model_kwargs.extra={'img_size': 32, 'depth': 2}")
    more = (*network, "trainer.mixup_kwargs.prob=0", "optim.optim_kwargs.name=sgd")
    whole = build(process, runs, data, *more)
    train(whole)
    stopped = build(process, runs, data, *more)
    during_step(stopped, 2, kill_self if process.rank == 1 else nn.Identity())
    train(stopped)
    if process.rank == 1:
        return {}
    overrides = short_run(data, runs, *TINY_NETWORK, *more, f"trainer.resume_dir={stopped.folder}")
    alone = build_run(load_config(CONFIG, overrides, world_size=1), Process())
    position = (alone.state.step, alone.state.iteration)
    train(alone)
    return {"whole": weights(whole), "stopped": weights(stopped), "alone": weights(alone), "position": position}


@scenario
def frozen(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    """Train the head and the last stage; return the parts that changed, in the weights or in their average."""
    more = ("trainer.dist_BN=reduce", "test_start_epoch=0", "nb_classes=None", "model.freeze=conv_stem,bn1,blocks")
    run = build(process, runs, data, *more)
    start = {name: value.clone() for name, value in run.network.state_dict().items()}
    train(run)
    changed = {
        name.split(".")[0]
        for network in (run.network, run.average.module)
        for name, value in network.state_dict().items()
        if not torch.equal(value, start[name])
    }
    return {"changed": sorted(changed), "net": run.network.state_dict(), "classes": run.config.nb_classes}


@scenario
def unreadable_test_image(process: Process, runs: Path, data: Path) -> str:
    root = Path(process.on_first(lambda: str(_broken(runs))))
    try:
        train(build(process, runs, root, "test_start_epoch=0"))
    except RunError as error:
        return str(error)
    return ""


@scenario
def disk_full(process: Process, runs: Path, data: Path) -> list[str]:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(runs / "latest_ckpt.pth"))

    told = []
    for is_async in ("false", "true"):
        run = build(process, runs, data, f"trainer.async_save={is_async}")
        save, CheckpointStore.save_latest = CheckpointStore.save_latest, full
        try:
            train(run)
        except RunError as error:
            told.append(str(error))
        finally:
            CheckpointStore.save_latest = save
    return told


@scenario
def messages(process: Process, runs: Path, data: Path) -> dict[str, Any]:
    """Both fail in the same way; then only rank 1."""
    errors.PATIENCE_SECONDS = 1.0
    said = {}
    process.on_first(lambda: runs.mkdir())
    for name, is_failing in (("both", True), ("one", process.rank == 1)):
        launch = Launch(rank=process.rank, world_size=2, dist_url=f"file://{runs}/{name}")

        def body(launch: Launch, is_failing: bool = is_failing) -> int:
            if is_failing:
                raise ValueError("no such thing")
            return 0

        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            code = exit_code_of(lambda launch=launch: launch, body)
        said[name] = (code, stderr.getvalue())
    return said


def _broken(runs: Path) -> Path:
    root = write_class_folders(runs / "data")
    (root / "val" / "green" / "1.png").write_bytes(b"")
    return root
