"""Faults during a run: logs and disks that fail, a folder that is deleted, jobs that are killed again and again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from trainer_cases import CONFIG, REPOSITORY, TINY_NETWORK, epoch_records, short_run

from configs import load_config
from configs.overrides import get_entry
from model import create_model
from trainer.checkpoint import CheckpointStore, load_training_checkpoint
from trainer.run_folder import RunLock
from trainer.train import is_save_due, train
from util.errors import RunError
from util.logging import setup_console


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


by_whom = pytest.mark.parametrize(
    "is_async", ["trainer.async_save=false", "trainer.async_save=true"], ids=["at once", "by a thread"]
)


@pytest.mark.parametrize("log", ["_scalars", "_epochs"])
def test_a_log_that_cannot_be_written_does_not_stop_the_run(build, monkeypatch, caplog, log):
    run = build()
    target = run.report._epochs if log == "_epochs" else run.report._scalars._logs[run.folder / "tensorboard"]
    monkeypatch.setattr(target, "write", full)
    assert train(run) == 0
    name = {"_scalars": "tensorboard", "_epochs": "epochs.jsonl"}[log]
    text = caplog.text
    assert text.count(f"{run.folder / name} cannot be written (No space left on device): the run continues") == 1
    assert text.count(f"the log is incomplete: {run.folder / name} could not be written") == 1
    assert load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"] == 6


@by_whom
def test_the_run_has_the_last_word_on_a_full_disk(build, monkeypatch, caplog, is_async):
    """Neither the logs nor the closers hide the error and the last good checkpoint."""
    run = build(is_async)
    save = CheckpointStore.save_latest

    def save_first_epoch(store, state):
        return save(store, state) if state["epoch"] == 0 else full()

    monkeypatch.setattr(CheckpointStore, "save_latest", save_first_epoch)
    monkeypatch.setattr(run.report._scalars, "close", full)
    monkeypatch.setattr(run.report, "close", full)
    with pytest.raises(RunError, match=r"No space left on device; the last good checkpoint is .*latest_ckpt\.pth") as e:
        train(run)
    assert e.value.exit_code == 2
    assert "Report.close failed" in caplog.text or "full failed" in caplog.text
    lock = _lock_elsewhere(run.folder)  # the saver was closed all the same
    assert lock == ""


@by_whom
def test_a_stop_that_cannot_be_saved_names_the_last_good_checkpoint(build, monkeypatch, is_async):
    run = build("trainer.max_bad_steps=1", is_async)
    compute_loss = run.stepper.compute_loss

    def spoil(images, targets):
        if run.state.iteration == 2:
            monkeypatch.setattr(CheckpointStore, "save_latest", full)
        return compute_loss(images * (float("nan") if run.state.iteration == 2 else 1.0), targets)

    run.stepper.compute_loss = spoil
    with pytest.raises(RunError, match=r"No space left on device; the last good checkpoint is"):
        train(run)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the permission to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@by_whom
def test_a_disk_that_fills_up_during_a_run(build, small_disk, caplog, is_async):
    run = build(f"trainer.checkpoint={small_disk}", "epoch_full=50", is_async)
    compute_loss = run.stepper.compute_loss

    def filling(images, targets):
        if run.state.iteration == 4:
            run.saver.wait()
            with (small_disk / "others").open("wb", buffering=0) as file:
                while shutil.disk_usage(small_disk).free:
                    file.write(bytes(shutil.disk_usage(small_disk).free))
        return compute_loss(images, targets)

    run.stepper.compute_loss = filling
    with pytest.raises(RunError, match=r"cannot be saved \(No space left on device\); .*the last good checkpoint is"):
        train(run)
    assert load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"] == 4


@by_whom
def test_a_folder_deleted_during_a_run_is_made_again(build, caplog, is_async):
    setup_console(is_logging=True)
    run = build(is_async)
    compute_loss = run.stepper.compute_loss

    def deleting(images, targets):
        if run.state.iteration == 4:
            run.saver.wait()
            shutil.rmtree(run.folder)
        return compute_loss(images, targets)

    run.stepper.compute_loss = deleting
    assert train(run) == 0
    assert caplog.text.count(f"{run.folder} was deleted or moved during the run: it is made again") == 1
    assert load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"] == 6
    assert [record["epoch"] for record in epoch_records(run.folder)] == [2]
    assert (run.folder / "config.yaml").is_file()
    assert "results" in (run.folder / "log.txt").read_text()


@by_whom
def test_a_folder_deleted_after_the_last_save_is_made_again(build, monkeypatch, is_async):
    run = build(is_async)
    save = run.saver.save_latest

    def save_and_delete(state, **more):
        save(state, **more)
        if state.epoch == 2:
            run.saver.wait()
            shutil.rmtree(run.folder)
            run.saver.save_latest = save

    run.saver.save_latest = save_and_delete
    assert train(run) == 0
    assert load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"] == 6


def test_a_folder_that_cannot_be_made_again_fails_the_run(build):
    run = build()
    compute_loss = run.stepper.compute_loss

    def replacing(images, targets):
        if run.state.iteration == 4:
            shutil.rmtree(run.folder)
            run.folder.touch()
        return compute_loss(images, targets)

    run.stepper.compute_loss = replacing
    with pytest.raises(RunError) as caught:
        train(run)
    assert caught.value.exit_code == 2
    assert str(run.folder) in str(caught.value)


@by_whom
def test_a_job_killed_every_few_steps_gets_on(build, is_async):
    """Each start does 3 steps and dies without a word; at least 2 of them are kept."""
    reached, resume = [], ()
    for _ in range(3):
        run = build("trainer.save_per_epoch=1000", "batch_size=2", "epoch_full=9", is_async, *resume)
        compute_loss = run.stepper.compute_loss

        def dying(images, targets, run=run, compute_loss=compute_loss):
            if run.num_steps == 3:
                raise KeyError("killed")
            return compute_loss(images, targets)

        run.stepper.compute_loss = dying
        with pytest.raises(KeyError, match="killed"):
            train(run)
        reached.append(load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"])
        resume = (f"trainer.resume_dir={run.folder}",)
    assert reached == [2, 4, 6]


def test_when_saves_are_due():
    assert [step for step in range(1, 40) if is_save_due(100 + step, step, every=0)] == [1, 2, 4, 8, 16, 32]
    assert [step for step in range(1, 20) if is_save_due(100 + step, step, every=6)] == [1, 2, 4, 8, 14, 16]


def test_only_the_newest_periodic_checkpoints_are_kept(finish):
    run, _ = finish("epoch_full=4", "trainer.save_per_epoch=1", "trainer.keep_checkpoints=2")
    assert sorted(file.name for file in run.folder.glob("ckpt_*")) == ["ckpt_3.pth", "ckpt_4.pth"]


def test_pruning_leaves_what_is_not_its_own(tmp_path):
    store = CheckpointStore(tmp_path)
    for name in ("ckpt_9.pth", "ckpt_10.pth", "ckpt_11.pth", "ckpt_20.pth", "ckpt_best.pth", "net.pth"):
        (tmp_path / name).touch()
    store.prune(None, epoch=11)
    assert (tmp_path / "ckpt_9.pth").exists()
    store.prune(1, epoch=11)  # 20 is of before the run was taken back
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ckpt_11.pth",
        "ckpt_20.pth",
        "ckpt_best.pth",
        "net.pth",
    ]


def _try_lock(folder: Path, messages: multiprocessing.Queue) -> None:
    try:
        RunLock(folder).release()
        messages.put("")
    except ValueError as error:
        messages.put(str(error))


def _lock_elsewhere(folder: Path) -> str:
    """Return why another process cannot take a folder's lock; empty if it can."""
    context = multiprocessing.get_context("fork")
    messages = context.Queue()
    process = context.Process(target=_try_lock, args=(folder, messages))
    process.start()
    message = messages.get(timeout=60)
    process.join()
    return message


def test_a_run_holds_its_folder_until_it_ends(build):
    run = build()
    assert f"is in use by process {os.getpid()}" in _lock_elsewhere(run.folder)
    assert train(run) == 0
    assert _lock_elsewhere(run.folder) == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("batch_size=1", "trainer.mixup_kwargs.prob=0"), r"a training batch .* 1 image.*set a larger batch_size"),
        (
            ("batch_size=23", "trainer.mixup_kwargs.prob=0", "trainer.data.drop_last=false"),
            r"the last training batch .* 1 image.*BatchNorm.*trainer\.data\.drop_last=true",
        ),
    ],
    ids=["whole", "last"],
)
def test_a_batch_of_one_image_is_refused_before_the_first_step(build, more, message):
    with pytest.raises(ValueError, match=message):
        build(*more)


def test_one_image_is_enough_without_batch_norm(build):
    network = ("model.name=timm_vit_tiny_patch16_224", "model.model_kwargs.extra.img_size=32")
    build("batch_size=1", "trainer.mixup_kwargs.prob=0", *network)


def test_every_path_may_start_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = (
        "data.root",
        "trainer.checkpoint",
        "trainer.resume_dir",
        "model.model_kwargs.checkpoint_path",
        "loss.loss_terms.1.cfg.model_kwargs.checkpoint_path",
    )
    config = load_config(f"{CONFIG}s", [f"{path}=~/here" for path in paths])
    found = [get_entry(config, path) for path in paths[:-1]]
    found.append(config.loss.loss_terms[1].cfg.model_kwargs.checkpoint_path)
    assert found == 5 * ["/home/someone/here"]
    predict = ("predict.input", "predict.output", "predict.sheet")
    config = load_config(CONFIG, [f"{path}=~/here.png" for path in predict], mode="predict")
    assert [get_entry(config, path) for path in predict] == 3 * ["/home/someone/here.png"]


def _start(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run.py", "-c", CONFIG, "-m", "train", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **options)


def test_a_closed_pipe_does_not_end_a_run(class_folders, tmp_path):
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK)
    run = _start(*short, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    errors = run.stderr.read()
    assert (run.wait(timeout=120), errors) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert "results" in (folder / "log.txt").read_text()


INTERRUPTED = """
import os, signal, sys
import trainer.setup

def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)

trainer.setup.build_network = interrupt
sys.argv = ["run.py", *sys.argv[1:]]
import run
from util.cli import interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(interruptible(run.main))
"""


def test_ctrl_c_while_a_run_is_set_up_is_one_line(class_folders, tmp_path):
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK)
    command = [sys.executable, "-c", INTERRUPTED, "-c", CONFIG, "-m", "train", *short]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted before there was anything to save\n")


# The read is many short ones: a signal that came just before a long one would wait for the next, and both count as one.
HANGING = """
import faulthandler, select, sys
from pathlib import Path
import data.samples
from trainer.stop import SignalWatch

sys.argv.pop(0)
folder = Path(sys.argv[0])

def hang(*_):
    (folder / "reached").touch()
    while True:
        select.select([], [], [], 0.1)

def noted(watch, number, frame):
    (folder / "noted").touch()
    note(watch, number, frame)

faulthandler.dump_traceback_later(120, exit=True)
data.samples.SampleReader.__getitems__ = hang
note, SignalWatch._note = SignalWatch._note, noted
import run
from util.cli import interruptible
sys.exit(interruptible(run.main))
"""


def _wait_for(file, run):
    while not file.exists() and run.poll() is None:
        time.sleep(0.1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_a_second_ctrl_c_ends_a_read_that_hangs(class_folders, tmp_path, workers, mode):
    weights = tmp_path / "net.pth"
    torch.save(create_model("timm_mobilenetv3_small_050", num_classes=3).state_dict(), weights)
    more = [f"model.model_kwargs.checkpoint_path={weights}"] if mode == "test" else []
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, f"trainer.data.num_workers_per_gpu={workers}")
    command = [sys.executable, "-c", HANGING, tmp_path, "-c", CONFIG, "-m", mode, *short, *more]
    run = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait_for(tmp_path / "reached", run)
    os.killpg(run.pid, signal.SIGINT)
    _wait_for(tmp_path / "noted", run)
    time.sleep(1)
    assert run.poll() is None
    os.killpg(run.pid, signal.SIGINT)
    errors = run.communicate(timeout=180)[1]  # the workers hold this pipe open, too
    told = "; there is no checkpoint yet" if mode == "train" else ""
    assert (run.returncode, errors) == (130, f"ended at once by a second Ctrl-C{told}\n")
