"""The demo, in a browser: an image goes in, its classes, the map and the time come out, with the network chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainer_cases import REPOSITORY, free_port

from configs import load_config, save_config
from model import create_model
from trainer.demo import FOLDED, PLAIN, Classifier, main

CLASSES = ["<b>zero</b>", "one", "two", "three", "four", "five"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A run's folder of a network for six classes, and one of another variant."""
    paths = []
    for seed, variant in enumerate(("T2", "T4")):
        folder = tmp_path_factory.mktemp("runs") / variant
        folder.mkdir()
        config = load_config(f"configs/mobilemamba/mobilemamba_{variant.lower()}", ["nb_classes=6", "size=64"])
        save_config(config, folder / "config.yaml")
        torch.manual_seed(seed)
        network = create_model(f"MobileMamba_{variant}", num_classes=6)
        torch.save({"net": network.state_dict(), "class_names": CLASSES}, folder / "net.pth")
        paths.append(folder / "net.pth")
    return paths


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return path


def expected(checkpoint, picture, *, runtime=FOLDED):
    classifier = Classifier(checkpoint, checkpoint.parent / "config.yaml", runtime=runtime)
    return classifier(Image.open(picture).convert("RGB"))


@pytest.mark.parametrize("runtime", [PLAIN, pytest.param("ONNX Runtime", marks=pytest.mark.slow)])
def test_an_answer_is_the_networks(checkpoints, picture, runtime):
    pytest.importorskip("pytorch_grad_cam")
    if runtime != PLAIN:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    answer = expected(checkpoints[0], picture, runtime=runtime)
    network = create_model("MobileMamba_T2", num_classes=6, checkpoint_path=checkpoints[0]).eval()
    classifier = Classifier(checkpoints[0], checkpoints[0].parent / "config.yaml", runtime=PLAIN)
    with torch.no_grad():
        shares = network(classifier.explainer.prepare(Image.open(picture).convert("RGB"))).softmax(1)[0]
    by_name = dict(zip(CLASSES, shares.tolist(), strict=True))
    assert list(answer.shares) == sorted(CLASSES, key=by_name.get, reverse=True)[:5]
    assert answer.shares == pytest.approx({name: by_name[name] for name in answer.shares}, abs=1e-5)
    assert answer.overlay.size == (64, 64)
    assert answer.seconds > 0


def test_a_wrong_file_is_one_line(tmp_path, capsys):
    pytest.importorskip("gradio")
    pytest.importorskip("pytorch_grad_cam")
    assert main(["--checkpoint", str(tmp_path / "none.pth")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "none.pth" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_page_in_a_browser(browser, checkpoints, picture, tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("pytorch_grad_cam")
    port = free_port()
    options = [option for path in checkpoints for option in ("--checkpoint", str(path))]
    with (tmp_path / "demo.log").open("w") as log:
        served = subprocess.Popen(
            [sys.executable, "-m", "trainer.demo", *options, "--port", str(port)],
            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait(lambda: answers(port), tmp_path / "demo.log", served)
        browser.open(f"http://127.0.0.1:{port}/", width=1200, height=1000)
        wait(lambda: browser.count("input[type=file]"), tmp_path / "demo.log", served)
        browser.driver.find_element("css selector", "input[type=file]").send_keys(str(picture))
        wait(lambda: " ms: MobileMamba_T2, 64 px, PyTorch, folded, c" in browser.text(), tmp_path / "demo.log", served)
        assert_shown(browser, expected(checkpoints[0], picture))
        choose(browser, "Checkpoint", "T4/net.pth")
        wait(lambda: " ms: MobileMamba_T4, 64 px, PyTorch, folded, c" in browser.text(), tmp_path / "demo.log", served)
        assert_shown(browser, expected(checkpoints[1], picture))
        choose(browser, "Runtime", "PyTorch")
        wait(lambda: " ms: MobileMamba_T4, 64 px, PyTorch, c" in browser.text(), tmp_path / "demo.log", served)
        photograph(browser, tmp_path / "demo.log", served)
        assert all(name.startswith(f"http://127.0.0.1:{port}/") for name in browser.requests()), browser.requests()
        assert not [error for error in browser.errors() if "127.0.0.1" not in error or "Uncaught" in error]
        if folder := os.environ.get("DEMO_PICTURES"):
            browser.screenshot(Path(folder) / "demo.png")
    finally:
        served.terminate()
        served.wait(timeout=30)


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def wait(is_there, log, served, seconds=120):
    end = time.monotonic() + seconds
    while not is_there():
        assert served.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.3)


def assert_shown(browser, answer):
    """The first classes stand in their order, each with its percentage; names are only text."""
    text = browser.text()
    places = [text.index(name) for name in answer.shares if name in text]
    assert len(places) == len(answer.shares), text
    assert {f"{share:.0%}" for share in answer.shares.values()} <= set(re.findall(r"\d+%", text))
    pictures = "return [...document.images].filter(image => image.naturalWidth === 64).length"
    assert browser.driver.execute_script(pictures) >= 1


def photograph(browser, log, served):
    """The page's camera, which the browser makes up, gives an image that is answered too."""
    for label in ("Remove Image", "Capture from camera", None, "capture photo"):
        selector = f"button[aria-label='{label}']" if label else "[title='grant webcam access']"
        wait(lambda selector=selector: browser.count(selector), log, served)
        if label == "Capture from camera":
            wait(lambda: " ms: " not in browser.text(), log, served)
        browser.driver.find_element("css selector", selector).click()
    wait(lambda: " ms: MobileMamba_T4, 64 px, PyTorch, c" in browser.text(), log, served)


def choose(browser, label, value):
    field = browser.driver.find_element("css selector", f"input[aria-label='{label}']")
    field.click()
    wait_for_option = time.monotonic() + 10
    options = []
    while not options and time.monotonic() < wait_for_option:
        found = browser.driver.find_elements("css selector", "[role=option]")
        options = [option for option in found if option.get_attribute("aria-label") == value or option.text == value]
    options[0].click()
