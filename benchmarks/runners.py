"""A network in a runtime: PyTorch with or without compiled kernels, or a file of `model.export` in its own runtime.

`Preparation.prepare` gives what runs a network once, on images that are already in place, after it has compared the
runtime's output with PyTorch's.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.export import FORMATS, ExportRequest, default_request, export
from model.export.check import read_images, size_on_disk
from model.export.formats import require
from model.export.int8 import quantise_static
from model.lib_mamba import use_backend

from .networks import Candidate
from .photographs import write_crops

__all__ = ["PRECISIONS", "RUNTIMES", "Preparation", "Prepared", "versions"]

Answer = Callable[[np.ndarray], Any]  # images (B, C, H, W) -> logits (B, num_classes)
# For each runtime the format of its files; None for PyTorch itself.
RUNTIMES: dict[str, str | None] = {
    "eager": None,
    "kernels": None,
    "compile": None,
    "aoti": "aoti",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "ncnn": "ncnn",
    "litert": "litert",
    "executorch": "executorch",
    "coreml": "coreml",
}
PRECISIONS = ("fp32", "fp16", "int8")
MAX_ERROR = 1e-3  # of the largest logit, in fp32
NUM_CALIBRATION_IMAGES = 32
CALIBRATION_SEED, CHECK_SEED = 0, 1
PACKAGES = (
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "ncnn",
    "litert-torch",
    "ai-edge-litert",
    "executorch",
    "coremltools",
)


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, of those that runtimes need."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A network in a runtime.

    Attributes:
        run: Runs it once; None where the runtime does not exist for this system, so that nothing below is known.
        num_bytes: Size of its file, or files; None for PyTorch itself.
        error: The largest difference from PyTorch's logits, as a share of the largest.
        decibels: Signal to noise of the logits.
        agreement: The share of images with the same most probable class.
        num_images: Images compared.
    """

    run: Callable[[], Any] | None
    num_bytes: int | None = None
    error: float | None = None
    decibels: float | None = None
    agreement: float | None = None
    num_images: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what a result file keeps of it."""
        names = ("num_bytes", "error", "decibels", "agreement", "num_images")
        return {name: getattr(self, name) for name in names}


class Preparation:
    """One network at one batch size, to be run in any runtime.

    Args:
        candidate: The network.
        batch: Images at once.
        folder: Where exported files go, and stay to be used again.
        threads: Threads of each runtime.
        num_images: Images to compare answers on; rounded up to whole batches.
    """

    def __init__(self, candidate: Candidate, batch: int, folder: Path, threads: int, *, num_images: int = 16) -> None:
        self.candidate = candidate
        self.batch = batch
        self.folder = folder
        self.threads = threads
        pictures = write_crops(folder / "photographs", batch * math.ceil(num_images / batch), seed=CHECK_SEED)
        self.images = np.concatenate(read_images(self._request("fp32"), pictures, num_made_up=0))
        with torch.inference_mode():
            parts = [candidate.network(torch.from_numpy(part)) for part in self._batches()]
        self.expected: Tensor = torch.cat(parts)

    def _batches(self) -> Iterator[np.ndarray]:
        return (self.images[start : start + self.batch] for start in range(0, len(self.images), self.batch))

    def prepare(self, runtime: str, precision: str = "fp32") -> Prepared:
        """Return what runs the network once, and how its answers compare with PyTorch's.

        Args:
            runtime: One of `RUNTIMES`.
            precision: One of `PRECISIONS`; "fp16" and "int8" in exported files alone.

        Raises:
            ValueError: If the runtime has no such precision, or is not made for the network.
            ModuleNotFoundError: If a package is missing.
            RuntimeError: If it cannot run the network, or gives something else.
        """
        if precision != "fp32" and RUNTIMES[runtime] is None:
            raise ValueError(f"{runtime} runs in fp32, not in {precision}")
        if runtime == "kernels" and self.candidate.kind != "ours":
            raise ValueError(f"the compiled kernels are not made for {self.candidate.name}")
        if RUNTIMES[runtime] is None:
            return self._compare(self._in_pytorch(runtime), runtime, precision, None)
        path = self._file(runtime, precision)
        num_bytes = size_on_disk([path.parent])
        answer = self._loaded(runtime, path)
        if answer is None:
            return Prepared(run=None, num_bytes=num_bytes)
        return self._compare(answer, runtime, precision, num_bytes)

    def _compare(self, answer: Answer, runtime: str, precision: str, num_bytes: int | None) -> Prepared:
        actual = torch.cat([torch.as_tensor(answer(part)) for part in self._batches()])
        difference = (actual - self.expected).double()
        error = (difference.abs().max() / self.expected.abs().max()).item()
        if precision == "fp32" and not error <= MAX_ERROR:
            raise RuntimeError(f"{self.candidate.name} in {runtime} is off by {error:.1e} of the largest logit")
        noise = difference.square().sum() / self.expected.double().square().sum()
        return Prepared(
            run=functools.partial(answer, next(self._batches())),
            num_bytes=num_bytes,
            error=error,
            decibels=-10 * math.log10(max(noise.item(), 1e-30)),
            agreement=(actual.argmax(1) == self.expected.argmax(1)).double().mean().item(),
            num_images=len(self.images),
        )

    def _in_pytorch(self, runtime: str) -> Answer:
        network: Any = self.candidate.network
        if runtime == "compile":
            network = torch.compile(network, dynamic=False)

        def answer(images: np.ndarray) -> Tensor:
            with use_backend("reference" if runtime == "eager" else "cpu"), torch.inference_mode():
                return network(torch.from_numpy(images))

        return answer

    def _loaded(self, runtime: str, path: Path) -> Answer | None:
        """Return what runs a file on as many threads as are wanted; ExecuTorch decides itself."""
        if runtime == "onnxruntime":
            return self._onnxruntime(path)
        if runtime == "openvino":
            return self._openvino(path)
        run = FORMATS[RUNTIMES[runtime]].load(path)
        return None if run is None else lambda images: run(images)[0]

    def _onnxruntime(self, path: Path) -> Answer:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # the next case wants the cores
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]

    def _openvino(self, path: Path) -> Answer:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        network: Any = openvino.Core().compile_model(path, "CPU", settings)
        return lambda images: network(images)[0]

    def _file(self, runtime: str, precision: str) -> Path:
        """Return the file of a runtime and a precision, in a folder of its own; written when it is first asked for."""
        name = RUNTIMES[runtime]
        if self.candidate.kind != "ours":
            name = "onnx"
            if runtime not in ("onnxruntime", "openvino") or precision == "fp16":
                raise ValueError(f"{self.candidate.name} is exported to ONNX alone, in fp32 and int8")
        format = require(name)
        folder = self.folder / f"{self.candidate.name}-{self.batch}-{name}-{precision}"
        path = folder / f"network{format.SUFFIX}"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            self._write(path, name, precision)
        return path

    def _write(self, path: Path, format: str, precision: str) -> None:
        if self.candidate.kind == "ours":
            request = self._request(precision)
            export(self.candidate.network, path, format=format, request=request, images=[self.images[:1]])
        elif precision == "int8":
            self._quantize_peer(path)
        else:
            from timm.utils.onnx import onnx_export

            images = torch.from_numpy(next(self._batches()))
            onnx_export(self.candidate.network, str(path), example_input=images, check=False)

    def _request(self, precision: str) -> ExportRequest:
        size = (self.candidate.size, self.candidate.size)
        if self.candidate.kind != "ours":
            return ExportRequest(size=size, batch=self.batch)
        calibration = self.folder / "calibration"
        if precision == "int8":
            write_crops(calibration, NUM_CALIBRATION_IMAGES, seed=CALIBRATION_SEED)
        return default_request(
            self.candidate.network,
            size=size,
            batch=self.batch,
            fp16=precision == "fp16",
            int8=precision == "int8",
            calibration=calibration,
        )

    def _quantize_peer(self, path: Path) -> None:
        """Quantise the convolutions, as `model.export` does those of our networks."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source = self._file("onnxruntime", "fp32")
        prepared = path.with_suffix(".prepared")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        pictures = write_crops(self.folder / "calibration", NUM_CALIBRATION_IMAGES, seed=CALIBRATION_SEED)
        images = np.concatenate(read_images(self._request("fp32"), pictures, num_made_up=0))
        name, whole = _input_of(source), len(images) // self.batch * self.batch
        batches = [{name: batch} for batch in np.split(images[:whole], whole // self.batch)]
        quantise_static(prepared, path, batches, operators=["Conv"])
        prepared.unlink()


def _input_of(path: Path) -> str:
    import onnx

    return onnx.load(path, load_external_data=False).graph.input[0].name
