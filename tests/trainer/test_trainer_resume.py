"""A run that is stopped and resumed is bit-equal to one that never stopped."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from trainer_cases import assert_same, epoch_records, write_class_folders

from trainer.checkpoint import load_training_checkpoint
from trainer.precision import Precision
from trainer.train import train

VARIED = ("config", "time_spent")  # differ in the folder's name and in time


def stop_after(run, num_steps: int, number: int = signal.SIGTERM) -> None:
    """Have the process signal itself during a step."""
    compute_loss = run.stepper.compute_loss
    calls = iter(range(1, 1000))

    def signalling(images, targets):
        if next(calls) == num_steps:
            os.kill(os.getpid(), number)
        return compute_loss(images, targets)

    run.stepper.compute_loss = signalling


def comparable(checkpoint: dict) -> dict:
    """Leave out entries that depend on the clock."""
    kept = {name: value for name, value in checkpoint.items() if name not in VARIED}
    kept["progress"] = {**checkpoint["progress"], "seconds": None}
    kept["rng"] = [
        {"state": own["state"], "epoch": own["meters"]["epoch"], "CE": own["meters"]["train"]["CE"]}
        for own in checkpoint["rng"]
    ]
    return kept


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_steps", [3, 1, 5], ids=["epoch-end", "mid-epoch", "mid-second-epoch"])
def test_stopped_and_resumed_equals_never_stopped(build, finish, num_steps, num_workers):
    workers = f"trainer.data.num_workers_per_gpu={num_workers}"
    _, expected = finish("test_start_epoch=0")

    stopped = build(workers, "test_start_epoch=0")
    stop_after(stopped, num_steps)
    assert train(stopped) == 143
    left = load_training_checkpoint(stopped.folder / "latest_ckpt.pth")
    assert left["iter"] == num_steps

    resumed, actual = finish(workers, "test_start_epoch=0", f"trainer.resume_dir={stopped.folder}")
    assert resumed.folder == stopped.folder
    assert actual["iter"] == expected["iter"] == 6
    expected["meta"] = actual["meta"]  # of equal runs, by check_resumable
    assert_same(comparable(actual), comparable(expected))
    assert [record["epoch"] for record in epoch_records(resumed.folder)] == [1, 2]


def test_resume_from_a_finished_epoch(build, finish):
    first, expected = finish("trainer.save_per_epoch=1")
    shutil.copy(first.folder / "ckpt_1.pth", first.folder / "latest_ckpt.pth")
    resumed, actual = finish("trainer.save_per_epoch=1", f"trainer.resume_dir={first.folder}")
    assert resumed.state.iteration == 6
    assert_same(comparable(actual), comparable(expected))
    # The second epoch's line of the first run is gone, that of the second stands.
    assert [record["epoch"] for record in epoch_records(first.folder)] == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "scaled-float16"])
def test_resume_in_half_precision_with_accumulation(build, finish, monkeypatch, dtype):
    monkeypatch.setattr("trainer.setup.build_precision", lambda config, device: Precision(device, dtype))
    more = ("trainer.accumulation_steps=2", "batch_size=8")
    _, expected = finish(*more)
    stopped = build(*more)
    stop_after(stopped, 7)  # the first micro-batch of step 4
    assert train(stopped) == 143
    _, actual = finish(*more, f"trainer.resume_dir={stopped.folder}")
    assert (actual["scaler"] is None) == (dtype is torch.bfloat16)
    assert_same(comparable(actual), comparable(expected))


def test_a_stop_in_a_test_repeats_the_test(build, finish):
    _, expected = finish("test_start_epoch=0")
    stopped = build("test_start_epoch=0")
    evaluator = stopped.evaluator

    def signalling(network, *, title):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluator(network, title=title)

    stopped.evaluator = signalling
    assert train(stopped) == 130
    assert (stopped.state.epoch, stopped.state.step, stopped.state.scores) == (0, 3, [])
    _, actual = finish("test_start_epoch=0", f"trainer.resume_dir={stopped.folder}")
    assert_same(comparable(actual), comparable(expected))


def test_a_changed_dataset_is_refused(build, finish, tmp_path):
    root = write_class_folders(tmp_path / "other")
    run, _ = finish(f"data.root={root}")
    (root / "train" / "red" / "0.png").rename(root / "train" / "red" / "zero.png")
    with pytest.raises(ValueError, match="another dataset"):
        build(f"data.root={root}", f"trainer.resume_dir={run.folder}")


def test_another_batch_size_is_refused_or_rescaled(build, finish, caplog):
    run, _ = finish("trainer.save_per_epoch=1")
    shutil.copy(run.folder / "ckpt_1.pth", run.folder / "latest_ckpt.pth")
    resume = (f"trainer.resume_dir={run.folder}", "batch_size=4")
    with pytest.raises(ValueError, match=r"batch_size=8.*batch_size=4"):
        build(*resume)
    resumed, checkpoint = finish(*resume, "trainer.resume_rescale=true")
    assert resumed.schedule.steps_per_epoch == 6
    assert checkpoint["iter"] == 12
    assert "optim.lr" in caplog.text  # follows the batch size, and is told of


def test_a_rescaled_position_counts_images(build):
    stopped = build()
    stop_after(stopped, 2)
    assert train(stopped) == 143
    resumed = build(f"trainer.resume_dir={stopped.folder}", "batch_size=4", "trainer.resume_rescale=true")
    assert (resumed.state.step, resumed.state.iteration) == (4, 4)


def test_zero_and_two_workers_give_the_same_weights(finish):
    _, left = finish("trainer.data.num_workers_per_gpu=0")
    _, right = finish("trainer.data.num_workers_per_gpu=2")
    _, other = finish("seed=7")
    assert_same(left["net"], right["net"])
    assert not all(torch.equal(left["net"][name], other["net"][name]) for name in left["net"])


def test_runs_that_start_in_the_same_second_have_their_own_folders(build, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20250101-000000")
    folders = {build().folder for _ in range(3)}
    assert len(folders) == 3
