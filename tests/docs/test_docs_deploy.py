"""The blocks of docs/deploy.md run as they stand, in their order, on one checkpoint and one picture."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from doc_blocks import ROOT, Block, blocks_of, play
from PIL import Image
from torchvision.transforms import v2

from benchmarks.networks import settle
from model import create_model

CLASSES = ["ant", "bee", "cat", "dog", "eel"]
# Reports what the page shows to the server that it came from.
REPORTER = """<script>
  const shown = document.getElementById("result");
  const report = (text) => fetch("/report", { method: "POST", body: text });
  new MutationObserver(() => report(shown.textContent)).observe(shown, { childList: true });
  addEventListener("unhandledrejection", (event) => report(`failed: ${event.reason}`));
  addEventListener("error", (event) => report(`failed: ${event.message}`));
</script>
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint and a picture, which is larger than the network's input and not square."""
    folder = tmp_path_factory.mktemp("deploy")
    torch.manual_seed(0)
    network = settle(create_model("MobileMamba_T2", num_classes=len(CLASSES)))
    torch.save({"net": network.state_dict(), "class_names": CLASSES}, folder / "net.pth")
    waves = torch.linspace(0, 20, 300).sin().outer(torch.linspace(0, 9, 260).cos())
    pixels = torch.stack([waves, waves.flip(0), waves * waves]).mul(100).add(128).byte()
    v2.functional.to_pil_image(pixels).resize((301, 263), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The probabilities that PyTorch gives, of a picture that torchvision prepares."""
    network = create_model("MobileMamba_T2", num_classes=len(CLASSES), checkpoint_path=folder / "net.pth").eval()
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.CenterCrop(round(0.875 * 263)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((192, 192), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        return network(prepare(Image.open(folder / "photo.png").convert("RGB"))[None])[0].softmax(0)


def blocks() -> list[Block]:
    return blocks_of("deploy.md")


def run(folder: Path, block: Block) -> str:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return play(folder, block, environment, timeout=600)


def write_files(folder: Path) -> None:
    for block in blocks():
        if block.mark.startswith("file: "):
            (folder / block.mark.removeprefix("file: ")).write_text(block.code, encoding="utf-8")


def check_first(line: str, expected: torch.Tensor, *, is_named: bool) -> None:
    """Check a line such as ``cat 0.61234``: the most probable class and its probability."""
    name, probability = line.split()
    first = int(expected.argmax())
    assert name == (CLASSES[first] if is_named else str(first))
    assert float(probability) == pytest.approx(expected.max().item(), abs=2e-3)


@pytest.fixture(scope="module")
def exported(folder):
    """The folder with t2.onnx in it."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (export,) = [block for block in blocks() if block.language == "bash" and not block.mark]
    assert "agrees with PyTorch" in run(folder, export)
    return folder


def test_every_block_says_how_it_is_run():
    marks = {(block.language, block.mark) for block in blocks()}
    assert {mark for language, mark in marks if language in ("kotlin", "swift")} == {"not run"}
    assert {language for language, mark in marks if mark != "not run"} == {"python", "bash", "cpp", "html"}
    assert {mark for _, mark in marks} == {
        "",
        "slow",
        "not run",
        "file: classify.cpp",
        "file: index.html",
        "file: prepare.py",
    }


def test_onnx_runtime_in_python(exported, expected):
    (block,) = [block for block in blocks() if block.language == "python" and not block.mark]
    lines = run(exported, block).splitlines()
    assert len(lines) == 3
    check_first(lines[0], expected, is_named=True)


@pytest.mark.slow
def test_openvino_in_python_and_in_cpp(folder, expected):
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    write_files(folder)
    export, python, cpp = [block for block in blocks() if block.mark == "slow" and "t2.xml" in block.code]
    assert "agrees with PyTorch" in run(folder, export)
    check_first(run(folder, python).splitlines()[0], expected, is_named=True)
    check_first(run(folder, cpp), expected, is_named=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "package"),
    [("t2.pt2", "torch"), ("t2.param", "ncnn"), ("t2.tflite", "litert_torch"), ("t2.pte", "executorch")],
    ids=["torch", "ncnn", "litert", "executorch"],
)
def test_with_pictures_that_are_prepared_outside(folder, expected, file, package):
    pytest.importorskip(package)
    write_files(folder)
    export, python = [block for block in blocks() if block.mark == "slow" and file in block.code]
    assert "agrees with PyTorch" in run(folder, export)
    check_first(run(folder, python), expected, is_named=True)


@pytest.mark.slow
def test_in_a_browser(exported, expected):
    programs = [shutil.which(name) for name in ("npm", "chromium")]
    if None in programs:
        pytest.skip("npm or chromium is not installed")
    write_files(exported)
    (install,) = [block for block in blocks() if "npm install" in block.code]
    run(exported, install)
    check_first(shown_by_chromium(exported, programs[1]), expected, is_named=False)


def shown_by_chromium(folder: Path, chromium: str) -> str:
    """Return the text that ``index.html`` shows."""
    reports: list[str] = []
    is_reported = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/":
                super().do_GET()
                return
            body = ((folder / "index.html").read_text(encoding="utf-8") + REPORTER).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            reports.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()
            is_reported.set()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    browser = subprocess.Popen(
        [chromium, *options, "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert is_reported.wait(120), "the page has shown nothing within two minutes"
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    return reports[0]
