"""A run that is stopped and resumed is bit-equal to one that never stopped."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from trainer_cases import assert_same, comparable, epoch_records, write_class_folders

from data.prepare import folder_to_lmdb
from trainer.checkpoint import load_training_checkpoint
from trainer.precision import Precision
from trainer.resume import newest_run, unsaved_run
from trainer.train import train


def stop_after(run, num_steps: int, number: int = signal.SIGTERM) -> None:
    """Have the process signal itself during a step."""
    compute_loss = run.stepper.compute_loss
    calls = iter(range(1, 1000))

    def signalling(images, targets):
        if next(calls) == num_steps:
            os.kill(os.getpid(), number)
        return compute_loss(images, targets)

    run.stepper.compute_loss = signalling


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

    def signalling(network, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluator(network, **options)

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


@pytest.fixture
def half(finish):
    """A run of two epochs put back to the end of its first; and the overrides that resume it."""

    def make(*more: str):
        run, _ = finish("trainer.save_per_epoch=1", *more)
        shutil.copy(run.folder / "ckpt_1.pth", run.folder / "latest_ckpt.pth")
        return run, f"trainer.resume_dir={run.folder}"

    return make


def change(run, edit) -> None:
    path = run.folder / "latest_ckpt.pth"
    checkpoint = load_training_checkpoint(path)
    edit(checkpoint)
    torch.save(checkpoint, path)


def test_optimiser_settings_that_are_said_are_used(build, half, caplog):
    _run, resume = half()
    resumed = build(resume, "weight_decay=0.5", "optim.optim_kwargs.betas=[0.8,0.99]")
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.0, 0.5]
    assert {tuple(group["betas"]) for group in resumed.optimizer.param_groups} == {(0.8, 0.99)}
    assert "weight_decay 0.05 -> 0.5" in caplog.text
    state = resumed.optimizer.state_dict()["state"]
    assert all(own["step"] == 3 for own in state.values())
    assert train(resumed) == 0


@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_another_optimiser_is_refused_or_starts_afresh(build, half, name):
    _run, resume = half()
    other = (resume, f"optim.optim_kwargs.name={name}")
    with pytest.raises(ValueError, match=rf"that of adamw, this run takes {name}.*trainer\.resume_optimizer=false"):
        build(*other)
    resumed = build(*other, "trainer.resume_optimizer=false")
    assert not resumed.optimizer.state_dict()["state"]
    assert resumed.state.iteration == 3
    assert train(resumed) == 0


def test_a_switch_of_the_optimiser_is_refused(build, half):
    _run, resume = half()
    with pytest.raises(ValueError, match="amsgrad=False in the file and True in this run"):
        build(resume, "optim.optim_kwargs.amsgrad=true")


def test_other_groups_of_the_optimiser_are_refused(build, half):
    _run, resume = half()
    with pytest.raises(ValueError, match=r"2 groups of .*optim\.layer_decay=None there and 0\.5 here"):
        build(resume, "optim.layer_decay=0.5")


def test_what_does_not_fit_is_one_report(build, half):
    run, resume = half()

    def spoil(checkpoint):
        checkpoint["net"]["conv_stem.weight"] = torch.zeros(2, 3)
        del checkpoint["net_E"]["classifier.bias"]
        del checkpoint["progress"]["bad_steps"]
        checkpoint["progress"]["epoch"] = "one"
        checkpoint["rng"] = []
        checkpoint["rng"].append({"state": {}})

    change(run, spoil)
    with pytest.raises(ValueError, match="does not fit this run") as caught:
        build(resume)
    for part in (
        str(run.folder / "latest_ckpt.pth"),
        "net: 1 of another shape, the file's for the network's: conv_stem 1 (conv_stem.weight 2x3 for ",
        "net_E: 1 missing from the file: classifier 1 (classifier.bias)",
        "progress: it lacks bad_steps",
        "progress: of another kind are epoch='one'",
        "rng: it holds no random states",
        "model.model_kwargs.checkpoint_path=",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda checkpoint: checkpoint.pop("progress"), "progress: the file lacks it"),
        (lambda checkpoint: checkpoint.update(meta=3), "its meta lacks model, fingerprint"),
        (lambda checkpoint: checkpoint.update(net=None), "net: it holds no weights"),
        (lambda checkpoint: checkpoint.update(optimizer=None), "optimizer: the file has 0 groups"),
        (lambda checkpoint: checkpoint.update(scheduler=1), "scheduler: it holds no state"),
    ],
    ids=["progress", "meta", "net", "optimizer", "scheduler"],
)
def test_a_checkpoint_that_is_not_whole_is_refused(build, half, edit, message):
    run, resume = half()
    change(run, edit)
    with pytest.raises(ValueError, match=message) as caught:
        build(resume)
    assert str(run.folder) in str(caught.value)


@pytest.fixture
def own_data(tmp_path):
    return write_class_folders(tmp_path / "own")


def test_another_validation_set_is_refused_or_accepted(build, half, own_data, caplog):
    _run, resume = half(f"data.root={own_data}")
    shutil.copy(own_data / "val/red/0.png", own_data / "val/red/new.png")
    other = (resume, f"data.root={own_data}")
    with pytest.raises(ValueError, match=r"15 validation images, this run has 24 training and 16 .*resume_data=True"):
        build(*other)
    assert train(build(*other, "trainer.resume_data=true")) == 0
    assert "was trained with another validation set" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_contents_under_the_same_names_are_refused_or_accepted(build, half, own_data, split):
    _run, resume = half(f"data.root={own_data}")
    shutil.copy(own_data / "train/blue/0.png", own_data / split / "red/1.png")
    other = (resume, f"data.root={own_data}")
    with pytest.raises(ValueError, match=r"other contents under the same names .*resume_data=True"):
        build(*other)
    build(*other, "trainer.resume_data=true")


def test_other_contents_of_an_lmdb_are_refused(build, half, own_data, tmp_path):
    def pack(name):
        folder_to_lmdb(own_data, tmp_path / name)
        return f"data.root={tmp_path / name}", "data.type=ImageFolderLMDB"

    _, resume = half(*pack("packed"))
    build(resume, *pack("again"))
    shutil.copy(own_data / "train/blue/0.png", own_data / "val/red/1.png")
    with pytest.raises(ValueError, match="other contents under the same names"):
        build(resume, *pack("changed"))


def test_a_copied_data_set_is_the_same(build, half, own_data, tmp_path):
    _run, resume = half(f"data.root={own_data}")
    shutil.copytree(own_data, tmp_path / "copy", copy_function=shutil.copyfile)
    build(resume, f"data.root={tmp_path / 'copy'}")


def test_a_checkpoint_of_before_these_facts_resumes(build, half):
    run, resume = half()

    def forget(checkpoint):
        for name in ("num_train", "num_test", "test_fingerprint", "contents"):
            del checkpoint["meta"][name]
        del checkpoint["config"]

    change(run, forget)
    with pytest.raises(ValueError, match="only one of the two has amsgrad, betas, eps, momentum, nesterov"):
        build(resume, "optim.optim_kwargs.name=sgd")
    assert train(build(resume)) == 0


AUTO = "trainer.resume_dir=auto"


def test_auto_resumes_the_newest_run_of_the_configuration(build, half):
    first = build(AUTO)
    assert first.state.iteration == 0  # there is none: a new run
    older, _ = half()
    newer, _ = half()
    half("seed=7")
    os.utime(older.folder / "latest_ckpt.pth", ns=(0, 0))
    resumed = build(AUTO, "trainer.save_per_iter=5")
    assert resumed.folder == newer.folder
    assert resumed.state.iteration == 3
    assert newest_run(build("seed=8").config) is None


def test_auto_takes_the_folder_of_a_run_that_ended_before_its_first_checkpoint(build, finish, caplog):
    caplog.set_level("INFO", "trainer")
    ended = build(AUTO, "test_start_epoch=0")
    (ended.folder / "epochs.jsonl").write_text('{"epoch": 1, "loss": 7}\n')  # its epoch was over, the save was not
    ended.saver.close()
    other = build(AUTO, "test_start_epoch=0", "seed=7")
    assert other.folder != ended.folder
    again, actual = finish(AUTO, "test_start_epoch=0")
    assert again.folder == ended.folder
    assert f"the run in {ended.folder} ended before its first checkpoint: it starts again" in caplog.text
    _, expected = finish("test_start_epoch=0")
    assert_same(comparable(actual), comparable(expected))
    assert [record["epoch"] for record in epoch_records(again.folder)] == [1, 2]


def test_auto_passes_over_runs_in_use_and_folders_of_others(build, half, monkeypatch, caplog):
    run, _ = half()
    (run.folder.parent / "other").mkdir()
    (run.folder.parent / "other" / "latest_ckpt.pth").touch()

    def in_use(folder):
        raise ValueError(f"{folder} is in use")

    monkeypatch.setattr("trainer.resume.RunLock", in_use)
    assert newest_run(run.config) is None
    for checkpoint in run.folder.glob("*.pth"):
        checkpoint.unlink()
    assert unsaved_run(run.config) is None
    monkeypatch.undo()
    assert unsaved_run(run.config) == run.folder
    (run.folder / "ckpt_1.pth").touch()  # kept apart
    assert unsaved_run(run.config) is None


def test_auto_with_another_batch_follows_the_rule_of_rescaling(build, half):
    run, _ = half()
    with pytest.raises(ValueError, match=r"batch_size=8.*batch_size=4.*trainer\.resume_rescale=True"):
        build(AUTO, "batch_size=4")
    resumed = build(AUTO, "batch_size=4", "trainer.resume_rescale=true")
    assert (resumed.folder, resumed.state.epoch) == (run.folder, 1)
    resumed.saver.close()
    shared = build(AUTO, "trainer.accumulation_steps=2")  # the same batch in two parts
    assert (shared.folder, shared.state.iteration) == (run.folder, 3)
