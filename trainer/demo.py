"""A page to try networks on: drop an image or use the camera, see its first classes, where the network looks, the time.

``python -m trainer.demo --checkpoint runs/mobilemamba/RUN/net_E.pth`` serves it on this machine; needs the extra
``demo`` (gradio, pytorch-grad-cam). Several checkpoints can be chosen from. A file's configuration is the
``config.yaml`` beside it, as in a run's folder, or else the one that ``-c`` names.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from configs import Config, load_config, with_classes
from data import find_class_names
from model.command import exit_code
from model.export import export
from model.export.formats import require
from util.distributed import Process

from .explain import Explainer
from .network import build_tested_network, count_head_classes, read_weights

__all__ = ["Answer", "Classifier", "build_page", "launch", "main"]

FOLDED, PLAIN = "PyTorch, folded", "PyTorch"
EXPORTED = {"ONNX Runtime": "onnx", "OpenVINO": "openvino"}  # by format; where the format's packages are installed
NUM_CLASSES = 5
NUM_TIMED = 3  # passes, of which the median is shown
TITLE = "MobileMamba"
SIDE = 320  # pixels, height of the pictures


class Answer(NamedTuple):
    """The answer to one image.

    Attributes:
        shares: Probability of the first classes, by their names.
        overlay: Where the network sees the first one.
        seconds: Median time of a forward pass.
    """

    shares: dict[str, float]
    overlay: Image.Image
    seconds: float


class Classifier:
    """A network with what belongs to it: pipeline, names of the classes.

    Args:
        checkpoint: File with its weights.
        config_path: Configuration; only its network, size and pipeline matter.
        runtime: `FOLDED`, `PLAIN` or one of `EXPORTED`, into whose format the network is exported first.

    Raises:
        ValueError: If the weights do not fit the configuration, the network cannot be exported, or pytorch-grad-cam is
            missing.
        OSError: If a file cannot be read.
    """

    def __init__(self, checkpoint: Path, config_path: str | Path, *, runtime: str) -> None:
        is_folded = runtime == FOLDED
        overrides = [f"model.model_kwargs.checkpoint_path={checkpoint}", f"model.model_kwargs.fuse={is_folded}"]
        config = load_config(config_path, overrides, mode="predict")
        entries = read_weights(config)
        assert entries is not None, "a path is given"
        if config.nb_classes is None:
            config = with_classes(config, count_head_classes(config, entries))
        self.config: Config = config
        is_averaged = entries.get("net") is None and entries.get("net_E") is not None
        process = Process(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.network: nn.Module = build_tested_network(config, process, entries, ema=is_averaged)
        assert config.nb_classes is not None, "it has been counted"
        self.names = find_class_names(entries.get("class_names"), config.data, num_classes=config.nb_classes).words
        self.explainer = Explainer(self.network, config)
        self.device = torch.device("cpu") if runtime in EXPORTED else process.device
        self._run = _exported(self.network, EXPORTED[runtime], config.size) if runtime in EXPORTED else self.network

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Answer:
        """Classify an image in RGB."""
        images = self.explainer.prepare(image).to(self.device)
        logits = self._run(images)
        seconds = statistics.median(self._time(images) for _ in range(NUM_TIMED))
        shares, indices = logits[0].double().softmax(0).topk(min(NUM_CLASSES, logits.shape[1]))
        named = {self.names[index]: share for index, share in zip(indices.tolist(), shares.tolist(), strict=True)}
        return Answer(named, self.explainer.overlay(image, int(indices[0])), seconds)

    def _time(self, images: Tensor) -> float:
        start = time.perf_counter()
        self._run(images)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _exported(network: nn.Module, format: str, size: int) -> Callable[[Tensor], Tensor]:
    """Return a network in another runtime: images (1, C, H, W) -> logits (1, num_classes).

    Raises:
        ValueError: If it is no MobileMamba, or the runtime's answers are not PyTorch's.
    """
    chosen = require(format)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network").with_suffix(chosen.SUFFIX)
        report = export(network, path, format=format, size=(size, size))
        if not report.agrees:
            raise ValueError(f"{format}: {report}")
        run = chosen.load(path)
        assert run is not None, "these formats run everywhere"

    def forward(images: Tensor) -> Tensor:
        (logits,) = run(images.numpy())
        return torch.from_numpy(logits)

    return forward


def _runtimes() -> list[str]:
    """Return the names of the runtimes that are installed."""
    names = [FOLDED, PLAIN]
    for name, format in EXPORTED.items():
        with contextlib.suppress(ModuleNotFoundError):
            require(format)
            names.append(name)
    return names


def build_page(checkpoints: Sequence[Path], config_path: str) -> Any:
    """Return the page, a `gradio.Blocks`.

    Args:
        checkpoints: Files to choose from.
        config_path: Configuration of those that have none beside them.

    Raises:
        ValueError: If gradio is missing, or the first checkpoint cannot be used.
        OSError: If it cannot be read.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would report to its makers
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the demo needs gradio: pip install gradio ({error})") from error
    files = {str(Path(path.parent.name, path.name)): path for path in checkpoints}

    @functools.cache
    def load(name: str, runtime: str) -> Classifier:
        beside = files[name].parent / "config.yaml"
        return Classifier(files[name], beside if beside.is_file() else config_path, runtime=runtime)

    def classify(image: Image.Image | None, name: str, runtime: str) -> tuple[Any, Any, str]:
        if image is None:
            return None, None, ""
        try:
            classifier = load(name, runtime)
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error)) from error
        answer = classifier(image.convert("RGB"))
        config = classifier.config
        said = f"{config.model.name}, {config.size} px, {runtime}, {classifier.device.type}"
        return answer.shares, answer.overlay, f"{1e3 * answer.seconds:.1f} ms: {said}"

    first = next(iter(files))
    load(first, FOLDED)  # what is wrong with it is said before the page opens
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(f"# {TITLE}\nDrop an image, or use the camera.")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", sources=["upload", "webcam", "clipboard"], label="Image", height=SIDE)
                name = gradio.Dropdown(list(files), value=first, label="Checkpoint")
                runtime = gradio.Dropdown(_runtimes(), value=FOLDED, label="Runtime")
            with gradio.Column():
                shares = gradio.Label(num_top_classes=NUM_CLASSES, label="Classes")
                overlay = gradio.Image(label="Where it looks", interactive=False, height=SIDE)
                said = gradio.Markdown(elem_id="time")
        inputs, outputs = [image, name, runtime], [shares, overlay, said]
        for changed in inputs:
            changed.change(classify, inputs, outputs)
    return page


def launch(page: Any, *, host: str, port: int | None) -> None:
    """Serve a page until it is stopped, with fonts of the reader's own system: it fetches nothing from elsewhere."""
    from gradio.themes import Default

    theme = Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(server_name=host, server_port=port, footer_links=[], theme=theme)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is stopped; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo", description="Serve a page to try networks on.")
    parser.add_argument(
        "--checkpoint", type=Path, action="append", required=True, help="file with weights; may be given again"
    )
    parser.add_argument(
        "-c", "--config", default="configs/mobilemamba/mobilemamba_t2", help="of files without a config.yaml beside"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on without it")
    options = parser.parse_args(arguments)

    def serve() -> None:
        launch(build_page(options.checkpoint, options.config), host=options.host, port=options.port)

    return exit_code(serve)


if __name__ == "__main__":
    sys.exit(main())
