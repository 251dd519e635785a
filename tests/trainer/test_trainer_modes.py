"""Training, fine-tuning and testing in one process, and the files that are left."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml
from tensorboardX.proto.event_pb2 import Event
from trainer_cases import CONFIG, TINY_NETWORK, epoch_records, short_run, write_class_folders

import data
import trainer
from configs import load_config
from data import build_loaders
from model import create_model
from trainer import build_run, run_mode
from trainer.checkpoint import load_training_checkpoint
from trainer.evaluate import count_correct
from trainer.train import train
from util.distributed import Process
from util.logging import setup_console

EXTRA = {"drop_rate": 0.2}


@pytest.fixture(scope="module")
def trained(class_folders, tmp_path_factory):
    """A run of 4 epochs, tested in 2, 3 and 4, kept in 3; and its last checkpoint."""
    epochs = ("epoch_full=4", "test_start_epoch=3", "trainer.test_per_epoch=2", "trainer.save_per_epoch=3")
    arguments = short_run(class_folders, tmp_path_factory.mktemp("runs"), *TINY_NETWORK, *epochs)
    setup_console(is_logging=True)
    run = build_run(load_config(CONFIG, arguments), Process())
    assert train(run) == 0
    return run, load_training_checkpoint(run.folder / "latest_ckpt.pth")


def test_training_leaves_its_files(trained):
    run, checkpoint = trained
    folder = run.folder
    for name in ("latest_ckpt.pth", "net.pth", "net_E.pth", "ckpt_3.pth", "config.yaml", "log.txt", "epochs.jsonl"):
        assert (folder / name).is_file(), name
    assert not (folder / "ckpt_1.pth").exists()
    assert list((folder / "tensorboard").glob("events*"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["ema"] == 0.9
    assert (checkpoint["iter"], checkpoint["epoch"]) == (12, 4)
    assert checkpoint["time_spent"] > 0
    assert load_training_checkpoint(folder / "ckpt_3.pth")["epoch"] == 3


def test_epochs_are_tested_as_asked(trained):
    run, checkpoint = trained
    records = epoch_records(run.folder)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert [sorted(record["test"]) for record in records] == [[], *3 * [["net", "net_E"]]]
    assert [score["epoch"] for score in checkpoint["scores"]] == [2, 3, 4]
    assert all(record["test"]["net"]["num_images"] == 15 for record in records[1:])
    assert all(0 < record["train"]["CE"] < 10 for record in records)


@pytest.mark.parametrize("name", ["net", "net_E"])
def test_the_best_weights_are_kept(trained, name):
    run, checkpoint = trained
    epoch, score = run.state.best(name)
    counts = {record["epoch"]: record[name]["top1_count"] for record in checkpoint["scores"]}
    assert score.top1_count == max(counts.values())
    assert epoch == next(epoch for epoch, count in counts.items() if count == score.top1_count)
    kept = torch.load(run.folder / f"{name}.pth", weights_only=True)
    assert kept["epoch"] == epoch
    assert kept["scores"] == {"top1": score.top1, "top5": score.top5}


def test_scalars_are_written(trained):
    run, _ = trained
    data = next((run.folder / "tensorboard").glob("events*")).read_bytes()
    tags = set()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        tags |= {(value.tag, event.step) for value in event.summary.value}
        data = data[12 + length + 4 :]
    assert {("train/CE", 12), ("train/lr", 3), ("test/net_top1", 12), ("test/net_E_top5", 6)} <= tags


def test_a_tracker_gets_the_numbers_of_a_run(finish, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'tracked'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run, _ = finish("logging.mlflow=squares", "test_start_epoch=0", "logging.train_log_per=2")
    client = mlflow.MlflowClient()
    (tracked,) = client.search_runs([client.get_experiment_by_name("squares").experiment_id])
    assert tracked.data.params["trainer.epoch_full"] == "2"

    def history(name):
        return [(point.step, point.value) for point in client.get_metric_history(tracked.info.run_id, name)]

    expected = [(record["iteration"], record["test"]["net"]["top1"]) for record in epoch_records(run.folder)]
    assert history("test/net_top1") == expected
    assert [step for step, _ in history("train/CE")] == [2, 3, 4, 6]


def test_lines_hold_progress_and_are_reset_as_asked(build, capsys):
    setup_console(is_logging=True)
    logging.getLogger().setLevel(logging.INFO)
    assert train(build("logging.train_log_per=2", "logging.train_reset_log_per=4")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " Train: " in line]
    assert [line.split("Train: ")[1].split(" [batch_t")[0] for line in lines] == [
        "33.3% [1/2] [2/6]",
        "50.0% [1/2] [3/6]",
        "66.7% [2/2] [4/6]",
        "100.0% [2/2] [6/6]",
    ]
    assert all("[lr 0.0000" in line and "[CE " in line and "[eta 0" in line and "[KD" not in line for line in lines)


def test_the_end_names_scores_and_files(build, capsys):
    setup_console(is_logging=True)
    run = build()
    assert train(run) == 0
    score = run.state.best("net_E")[1]
    text = capsys.readouterr().out
    assert f"net_E (best)  {score.top1:.3f}".split() == next(
        line.split()[:3] for line in text.splitlines() if line.startswith("net_E (best)")
    )
    assert f"files in {run.folder}" in text
    for word in ("device cpu", "torch 2", "1 process(es)", "seed 42", "precision float32", "parameters", "15 images"):
        assert word in text, word
    assert text.split("results")[1] in (run.folder / "log.txt").read_text()


def scores_of(overrides, *more: str, mode: str = "test") -> dict:
    tester = trainer.Tester(load_config(CONFIG, overrides(*more), mode=mode), Process())
    assert tester.run() == 0
    return tester.scores


@pytest.mark.parametrize(
    ("file", "mode", "expected"),
    [
        ("latest_ckpt.pth", "test", ["net", "net_E"]),
        ("latest_ckpt.pth", "test_net", ["net"]),
        ("net.pth", "test", ["net"]),
        ("net_E.pth", "test", ["net_E"]),
    ],
)
def test_the_tested_weights_are_those_in_the_file(trained, overrides, file, mode, expected):
    run, checkpoint = trained
    path = f"model.model_kwargs.checkpoint_path={run.folder / file}"
    scores = scores_of(overrides, *TINY_NETWORK, path, mode=mode)
    assert list(scores) == expected
    record = checkpoint["scores"][-1]
    for name, score in scores.items():
        counts = record[name]["top1_count"] if file == "latest_ckpt.pth" else run.state.best(name)[1].top1_count
        assert score.top1_count == counts
        assert score.num_images == 15


def test_a_score_is_that_of_a_plain_loop(trained, overrides):
    run, checkpoint = trained
    network = create_model("timm_mobilenetv3_small_050", num_classes=3, **EXTRA).eval()
    network.load_state_dict(checkpoint["net"])
    loaders = build_loaders(run.config, rank=0, world_size=1)
    right = sum((network(images).argmax(1) == targets).sum().item() for images, targets, _ in loaders.test.iterate())
    assert checkpoint["scores"][-1]["net"]["top1_count"] == right


def test_fine_tuning_starts_from_the_weights_with_a_fresh_head(trained, build, caplog, class_folders, tmp_path):
    run, checkpoint = trained
    root = tmp_path / "two_classes"
    for split in ("train", "val"):
        for name in ("blue", "red"):
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / name).symlink_to(class_folders / split / name)
    path = f"model.model_kwargs.checkpoint_path={run.folder / 'latest_ckpt.pth'}"
    short = ("epoch_full=1", "warmup_epochs=0")
    caplog.set_level(logging.INFO)
    tuned = build(f"data.root={root}", "nb_classes=2", path, "model.model_kwargs.ema=true", *short, mode="ft")
    weights = tuned.network.state_dict()
    assert weights["classifier.weight"].shape[0] == 2
    for name, value in checkpoint["net_E"].items():
        if not name.startswith("classifier."):
            assert torch.equal(weights[name], value), name
    assert "classifier" in caplog.text
    assert tuned.state.iteration == 0
    assert train(tuned) == 0


def test_fine_tuning_and_testing_need_weights(build, overrides):
    with pytest.raises(ValueError, match=r"-m ft.*checkpoint_path"):
        build("epoch_full=1", "warmup_epochs=0", mode="ft")
    with pytest.raises(ValueError, match=r"-m test needs weights.*checkpoint_path"):
        scores_of(overrides)


def test_training_may_start_from_weights(trained, build):
    run, checkpoint = trained
    started = build(f"model.model_kwargs.checkpoint_path={run.folder / 'latest_ckpt.pth'}")
    assert torch.equal(started.network.state_dict()["conv_stem.weight"], checkpoint["net"]["conv_stem.weight"])


def test_an_unreadable_test_image_gives_no_score(build, tmp_path):
    root = write_class_folders(tmp_path / "broken")
    (root / "val" / "red" / "2.png").write_bytes(b"not an image")
    run = build(f"data.root={root}", "test_start_epoch=0")
    with pytest.raises(RuntimeError, match=r"1 test images cannot be read.*red/2.png.*saved in"):
        train(run)
    assert load_training_checkpoint(run.folder / "latest_ckpt.pth")["iter"] == 3


def test_too_few_images_for_a_step(build):
    with pytest.raises(ValueError, match="accumulation_steps=8"):
        build(
            "trainer.accumulation_steps=8",
            "batch_size=32",
            "trainer.mixup_kwargs.prob=0",
            "trainer.data.drop_last=false",
        )


@pytest.mark.parametrize("mode", ["train", "test"])
def test_counting_classes_opens_no_split_twice(trained, build, overrides, monkeypatch, mode):
    opened, open_folder = [], data.datasets.DefaultCLS

    def counting(root, *, split, **options):
        opened.append(split)
        return open_folder(root, split=split, **options)

    monkeypatch.setitem(data.datasets.DATASETS, "DefaultCLS", counting)
    if mode == "train":
        build("nb_classes=None")
    else:
        weights = f"model.model_kwargs.checkpoint_path={trained[0].folder / 'net.pth'}"
        arguments = overrides(*TINY_NETWORK, "nb_classes=None", weights)
        trainer.Tester(load_config(CONFIG, arguments, mode="test"), Process())
    assert opened == {"train": ["train", "val"], "test": ["val"]}[mode]


def test_an_unknown_trainer_is_named(overrides):
    with pytest.raises(ValueError, match=r"no trainer\.name='CLSTrainr'; the nearest is 'CLSTrainer'"):
        run_mode(load_config(CONFIG, overrides("trainer.name=CLSTrainr")), Process())


@pytest.mark.parametrize("num_classes", [2, 5, 20])
def test_counts_against_a_sort(num_classes):
    logits = torch.randn(64, num_classes, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(64) % num_classes
    order = logits.argsort(dim=1, descending=True)
    top1, top5 = count_correct(logits, targets)
    assert top1 == sum(int(target in row[:1]) for row, target in zip(order.tolist(), targets.tolist(), strict=True))
    assert top5 == sum(int(target in row[:5]) for row, target in zip(order.tolist(), targets.tolist(), strict=True))


def test_logits_that_are_not_finite_are_wrong():
    logits = torch.eye(3)
    logits[1, 1] = float("nan")
    logits[2, 0] = float("inf")
    assert [int(count) for count in count_correct(logits, torch.arange(3))] == [1, 1]
