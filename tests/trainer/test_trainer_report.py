"""A run's page: what it shows, in a browser; what it holds, against a plain loop; and that it harms no run."""

from __future__ import annotations

import errno
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from trainer_cases import CONFIG, TINY_NETWORK, short_run

from configs import load_config, save_config
from data import build_loaders
from model import create_model
from trainer import build_run
from trainer.evaluate import AnswerSheet
from trainer.report.__main__ import main
from trainer.report.curves import Line, line_chart
from trainer.train import train
from util.distributed import Process

HOSTILE = """</style><script>document.title = 'run'</script><img src=x onerror="document.title = 'run'">"""
CHARTS = ("loss, CE", "top-1, %", "top-5, %", "learning rate", "images/s in training", "skipped steps, in all")


@pytest.fixture(scope="module")
def trained(class_folders, tmp_path_factory):
    """The folder of a run of three epochs, each of them tested."""
    more = ("epoch_full=3", "optim.lr=2e-3", "trainer.mixup_kwargs.prob=0", "test_start_epoch=0")
    config = load_config(CONFIG, short_run(class_folders, tmp_path_factory.mktemp("runs"), *TINY_NETWORK, *more))
    run = build_run(config, Process())
    assert train(run) == 0
    return run.folder


def write_run(folder, *overrides, num_epochs, num_classes=1000, name="goldfish"):
    """Write the files of a long run, with pictures of the size of a photo's."""
    folder.mkdir(parents=True)
    save_config(load_config(CONFIG, overrides), folder / "config.yaml")
    rng = np.random.default_rng(0)
    records = []
    for epoch in range(1, num_epochs + 1):
        top1 = 80 * (1 - math.exp(-epoch / 60)) + rng.uniform()
        tests = {weights: {"top1": top1, "top5": top1 + 10} for weights in ("net", "net_E")}
        record = {
            "epoch": epoch,
            "train": {"CE": 7 / epoch**0.3},
            "test": tests,
            "lr": rng.uniform(),
            "total_seconds": epoch,
        }
        keys = ("images_per_second", "slowest_rank_data_seconds", "skipped_steps", "unreadable")
        records.append({**record, **{key: rng.uniform(1, 999) for key in keys}})
    (folder / "epochs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = rng.integers(0, num_classes, (8 * num_classes, 2)).tolist()
    picture = f"data:image/jpeg;base64,{'QUJD' * 1500}"  # of noise; the largest that 112 pixels came to
    mistakes = [
        {"image": f"{name}{index}", "class": index, "answer": 1, "confidence": 0.9, "picture": picture}
        for index in range(24)
    ]
    content = {"epoch": num_epochs, "classes": [f"{name} {index}" for index in range(num_classes)]}
    content |= {"confusion": [[*pair, 3] for pair in pairs], "mistakes": mistakes}
    (folder / "mistakes_net.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_page_in_a_browser(browser, trained, tmp_path, width, is_dark):
    browser.open(trained / "report.html", width=width, is_dark=is_dark)
    text = browser.text()
    assert browser.errors() == []
    assert browser.requests() == []
    assert browser.overflow() <= 0
    for title in ("Overview", *CHARTS, "Worst classes", "Confusion", "Most confident mistakes", "Configuration"):
        assert title in text, title
    assert "3 of 3" in text
    assert "timm_mobilenetv3_small_050" in text
    assert browser.count("polyline.s0") >= len(CHARTS)
    assert browser.count("circle.s1") == 2 * 3  # averaged weights: top-1 and top-5 of three epochs
    pixels = np.asarray(Image.open(browser.screenshot(tmp_path / "page.png")).convert("L"))
    assert pixels.shape[1] == width
    assert (np.median(pixels) < 60) == is_dark
    assert np.unique(pixels).size > 50  # curves, text and pictures


def test_the_mistakes_are_those_of_the_best_weights(trained, class_folders):
    records = [json.loads(line) for line in (trained / "epochs.jsonl").read_text().splitlines()]
    config = load_config(trained / "config.yaml")
    for weights in ("net", "net_E"):
        found = json.loads((trained / f"mistakes_{weights}.json").read_text())
        network = create_model("timm_mobilenetv3_small_050", num_classes=3, drop_rate=0.2).eval()
        network.load_state_dict(torch.load(trained / f"{weights}.pth", weights_only=True)[weights])
        (batch,) = build_loaders(config, rank=0, world_size=1).test.iterate()
        confusion, wrong = np.zeros((3, 3), int), []
        for image, target in zip(batch.images, batch.targets.tolist(), strict=True):
            with torch.no_grad():
                shares = network(image[None]).softmax(1)[0]
            answer = int(shares.argmax())
            confusion[target, answer] += 1
            if target != answer:
                wrong.append((target, answer, float(shares.max())))
        pairs = np.argwhere(confusion).tolist()
        assert sorted(found["confusion"]) == [[target, answer, confusion[target, answer]] for target, answer in pairs]
        best = max((record["test"][weights] for record in records), key=lambda test: test["top1_count"])
        assert np.trace(confusion) == best["top1_count"]
        expected = sorted(wrong, key=lambda mistake: -mistake[2])
        assert [(entry["class"], entry["answer"]) for entry in found["mistakes"]] == [pair[:2] for pair in expected]
        assert [entry["confidence"] for entry in found["mistakes"]] == pytest.approx([e[2] for e in expected], abs=1e-3)
        assert all(entry["picture"].startswith("data:image/png;base64,") for entry in found["mistakes"])


def test_answers_of_several_processes_are_in_the_order_of_the_test_set():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 4), torch.arange(7) % 4
    logits[4, 2] = float("inf")
    sheets = [AnswerSheet(), AnswerSheet()]
    for rank, sheet in enumerate(sheets):
        for start in (rank, rank + 4):
            part = slice(start, start + 4, 2)
            sheet.add(logits[part], targets[part])
    shares = [torch.cat(sheet._batches, dim=1).numpy() for sheet in sheets]
    answers = sheets[0].gather(SimpleNamespace(world_size=2, gather_objects=lambda own: shares))
    assert answers.targets.tolist() == targets.tolist()
    expected = logits.argmax(1)
    expected[4] = -1
    assert answers.predicted.tolist() == expected.tolist()
    finite = np.arange(7) != 4
    assert answers.confidence[finite] == pytest.approx(logits.softmax(1).max(1).values.numpy()[finite], abs=1e-6)


def test_names_are_only_text(browser, tmp_path):
    folder = write_run(tmp_path / "<b>run<!--", f"data.root={HOSTILE}", num_epochs=3, num_classes=30, name=HOSTILE)
    assert main([str(folder)]) == 0
    browser.open(folder / "report.html")
    assert HOSTILE in browser.text()
    assert "<b>run<!--" in browser.text()
    assert browser.driver.title == "<b>run<!--"
    assert (browser.count("script"), browser.count("img[src=x]"), browser.errors()) == (0, 0, [])


def test_runs_side_by_side(browser, tmp_path):
    first = write_run(tmp_path / "first", "lr=2e-3", num_epochs=300)
    second = write_run(tmp_path / "second", "optim.lr=7e-3", num_epochs=40)
    with (second / "epochs.jsonl").open("a") as file:
        file.write('{"epoch": 41, "tra')  # killed there
    (second / "mistakes_net.json").write_text('{"epo')
    assert main([str(first)]) == 0
    assert (first / "report.html").stat().st_size < 1_000_000
    assert main([str(first), str(second), "--output", str(tmp_path / "both.html")]) == 0
    browser.open(tmp_path / "both.html", width=400)
    assert browser.overflow() <= 0
    assert browser.errors() == []
    script = "return [...document.querySelector('table.settings').rows].map(row => row.innerText.split('\\t'))"
    rows = {row[0]: row[1:] for row in browser.driver.execute_script(script)}
    assert rows == {
        "entry": ["recipe", "first", "second"],
        "lr": ["0.0015", "0.002", "0.0015"],
        "optim.lr": ["0.003", "0.004", "0.007"],
    }
    text = browser.text()
    assert "40 of 300" in text
    assert "Mistakes of first" in text
    assert "Mistakes of second" not in text


def test_a_page_that_cannot_be_written_does_not_stop_the_run(build, monkeypatch, caplog):
    """Neither for a full disk nor for a defect of the page."""
    run = build("test_start_epoch=0")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("trainer.report.log.write_page", lambda *_: {}["top1"])
    monkeypatch.setattr("trainer.report.log.write_mistakes", full)
    assert train(run) == 0
    for name in ("report.html", "mistakes_net.json", "mistakes_net_E.json"):
        assert caplog.text.count(f"{run.folder / name} cannot be written") == 1
    assert not (run.folder / "report.html").exists()


def test_the_page_is_written_after_each_epoch(build):
    run = build("epoch_full=3")
    seen = []
    saved = run.saver.save_latest

    def save(state, **options):
        page = run.folder / "report.html"
        seen.append((state.epoch, page.read_text().count("of 3</td>") if page.exists() else None))
        return saved(state, **options)

    run.saver.save_latest = save
    assert train(run) == 0
    assert {epoch: count for epoch, count in seen if epoch} == {1: 1, 2: 1, 3: 1}
    assert "3 of 3" in (run.folder / "report.html").read_text()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert (
        f"error: {tmp_path} is no run's folder: it has neither epochs.jsonl nor config.yaml" in capsys.readouterr().err
    )


def test_lines_pass_through_their_points():
    """A value that is not finite interrupts a line; one value alone, or equal ones, have a place too."""
    values = [1.0, 3.0, float("nan"), 2.0, 5.0]
    line = Line(name="a", points=list(enumerate(values, start=1)), colour=2)
    svg = line_chart("loss", [line], num_epochs=5)
    pieces = [part.split('"')[0] for part in svg.split('points="')[1:]]
    points = [[tuple(map(float, point.split(","))) for point in piece.split()] for piece in pieces]
    assert [len(piece) for piece in points] == [2, 2]
    (x1, y1), (x2, y2) = points[0]
    (x4, y4), (x5, y5) = points[1]
    assert x2 - x1 == pytest.approx(x5 - x4, abs=0.11)
    assert x4 - x1 == pytest.approx(3 * (x2 - x1), abs=0.3)
    assert (y4 - y1) / (y2 - y1) == pytest.approx(0.5, abs=0.01)
    assert (y5 - y1) / (y2 - y1) == pytest.approx(2, abs=0.02)
    for alone in ([7.0], [7.0, 7.0], [0.0]):
        svg = line_chart("lr", [Line(name="b", points=list(enumerate(alone, start=1)), colour=0)], num_epochs=1)
        assert "nan" not in svg
        assert svg.count("<circle") == len(alone)
    assert line_chart("none", [Line(name="c", points=[(1, float("inf"))], colour=0)], num_epochs=1) == ""
