"""The checked evaluation, end to end on a synthetic validation set with its own checkpoint."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs import load_config
from data import build_loaders
from model import create_model
from weights import check

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/mobilemamba/mobilemamba_t2"
CLASSES = ("blue", "green", "red", "white", "black", "grey", "pink")
PER_CLASS = 3
OVERRIDES = [f"nb_classes={len(CLASSES)}", "size=64", "trainer.data.num_workers_per_gpu=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """21 noisy images of 7 classes."""
    root = tmp_path_factory.mktemp("data") / "images"
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / "val" / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def zoo(images, tmp_path_factory, parity_fill) -> Path:
    """A list with one checkpoint, whose published figures are what its network really scores."""
    folder = tmp_path_factory.mktemp("zoo")
    network = create_model("MobileMamba_T2", num_classes=len(CLASSES))
    parity_fill.fill_(network)
    (folder / "weights").mkdir()
    torch.save({"net": network.state_dict()}, folder / "weights" / "mine.pth")
    config = load_config(CONFIG, [*OVERRIDES, f"data.root={images}"], mode="test")
    loader = build_loaders(config, rank=0, world_size=1).test
    top1, top5 = _scores(network.eval(), loader)
    dataset = {
        "title": "Made-up validation",
        "num_images": len(loader.dataset),
        "num_classes": len(CLASSES),
        "tolerance": 0.05,
        "fingerprint": loader.dataset.fingerprint(),
    }
    entry = {
        "task": "imagenet",
        "dataset": "mine",
        "network": "MobileMamba_T2",
        "path": "here/mine.pth",
        "config": CONFIG,
        "overrides": OVERRIDES,
        "published": {"top1": round(top1, 3), "top5": round(top5, 3)},
        "in_table": {"top1": round(top1 - 2.1, 1)},
    }
    (folder / "zoo.json").write_text(json.dumps({"datasets": {"mine": dataset}, "models": {"mine": entry}}))
    return folder / "zoo.json"


@torch.no_grad()
def _scores(network, loader):
    """Count by hand: no autocast, no topk, one image at a time."""
    hits = torch.zeros(2)
    for batch in loader.iterate():
        for image, target in zip(batch.images, batch.targets, strict=True):
            rank = int((network(image[None])[0].argsort(descending=True) == target).nonzero())
            hits += torch.tensor([rank < 1, rank < 5])
    return (100 * hits / len(loader.dataset)).tolist()


def changed(zoo: Path, tmp_path: Path, change) -> Path:
    """Return a copy of the list next to it, changed."""
    contents = json.loads(zoo.read_text())
    change(contents["datasets"]["mine"], contents["models"]["mine"])
    copy = zoo.with_name(f"{tmp_path.name}.json")
    copy.write_text(json.dumps(contents))
    return copy


def run(zoo: Path, data: Path, tmp_path: Path, *more: str):
    """Run the command in this process; return its exit code and its report."""
    place = ["--from", str(zoo.parent / "weights"), "--results", str(tmp_path / "results")]
    code = check.main(["mine", "--zoo", str(zoo), "--data", str(data), "--device", "cpu", *place, *more])
    (report,) = (tmp_path / "results").glob("*/check.json")
    return code, json.loads(report.read_text()), report.with_name("check.md").read_text()


def test_the_right_figures_pass(zoo, images, tmp_path, capsys):
    code, report, markdown = run(zoo, images, tmp_path)
    assert code == 0
    (result,) = report["results"]
    published = json.loads(zoo.read_text())["models"]["mine"]["published"]
    assert {figure["name"]: round(figure["measured"], 3) for figure in result["figures"]} == published
    assert [figure["verdict"] for figure in result["figures"]] == ["pass", "pass"]
    assert (result["num_images"], result["verdict"], result["doubts"]) == (21, "pass", [])
    assert result["images_per_second"] == pytest.approx(21 / result["seconds"])
    shown = capsys.readouterr().out
    for text in (shown, markdown):
        assert re.search(r"mine .*top1 .*pass", text)
        assert "the published table gives top1" in text
        assert "(+2.1" in text


def test_a_wrong_figure_fails_with_exit_code_1(zoo, images, tmp_path):
    wrong = changed(zoo, tmp_path, lambda _, entry: entry["published"].update(top5=entry["published"]["top5"] - 0.06))
    code, report, markdown = run(wrong, images, tmp_path)
    assert code == 1
    assert [figure["verdict"] for figure in report["results"][0]["figures"]] == ["pass", "FAIL"]
    assert "FAIL" in markdown
    assert "further than 0.05 points" in markdown


def test_a_second_known_value_passes_too(zoo, images, tmp_path):
    def change(_, entry):
        entry["also_known"] = {"top1": [entry["published"]["top1"]]}
        entry["published"]["top1"] += 1

    assert run(changed(zoo, tmp_path, change), images, tmp_path)[0] == 0


def test_a_part_of_the_set_is_declared_and_not_judged(zoo, images, tmp_path):
    def change(dataset, entry):
        dataset["num_images"] = 50_000
        entry["published"]["top1"] += 50

    code, report, markdown = run(changed(zoo, tmp_path, change), images, tmp_path)
    assert code == 0
    assert report["results"][0]["verdict"] == "not judged"
    assert "21 images, where Made-up validation has 50,000: a subset" in markdown


@pytest.mark.parametrize(("fingerprint", "message"), [("0" * 64, "another set than"), ("", "no fingerprint of")])
def test_another_or_an_unknown_set_is_not_judged(zoo, images, tmp_path, fingerprint, message):
    other = changed(zoo, tmp_path, lambda dataset, _: dataset.update(fingerprint=fingerprint))
    code, report, markdown = run(other, images, tmp_path)
    assert (code, report["results"][0]["verdict"]) == (0, "not judged")
    assert message in markdown


def test_a_checkpoint_that_cannot_be_had_is_an_error_with_a_report(zoo, images, tmp_path):
    contents = json.loads(zoo.read_text())
    contents["models"]["mine"]["path"] = "elsewhere/mine.pth"
    (tmp_path / "zoo.json").write_text(json.dumps(contents))
    (tmp_path / "weights").mkdir()
    code, report, _ = run(tmp_path / "zoo.json", images, tmp_path)
    assert code == 2
    assert report["results"] == []
    assert "has neither elsewhere/mine.pth nor mine.pth" in report["errors"][0]


def test_two_ranks_count_every_image_once(zoo, images, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.launch", "--use_env", "--nproc_per_node=2", f"--master_port={port}"]
    options = ["--zoo", str(zoo), "--data", str(images), "--from", str(zoo.parent / "weights")]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "weights.check",
            "mine",
            *options,
            "--results",
            str(tmp_path),
            "--device=cpu",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*/check.json")
    report = json.loads(file.read_text())
    assert report["processes"] == 2
    assert (report["results"][0]["num_images"], report["results"][0]["verdict"]) == (21, "pass")
    assert done.stdout.count("published against measured") == 1
