"""A network in a runtime: PyTorch with or without compiled kernels, torch.compile, ONNX Runtime, OpenVINO.

`prepare` gives what runs a network once, on images that are already in place, after it has compared the runtime's
output with PyTorch's.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.lib_mamba import use_backend

from .networks import Candidate

__all__ = ["PRECISIONS", "RUNTIMES", "Preparation", "versions"]

Run = Callable[[], Any]
# For each runtime the packages that it needs beside PyTorch.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "kernels": (),
    "compile": (),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "onnxruntime", "openvino"),
}
PRECISIONS = ("fp32", "int8")
MAX_ERROR = 1e-3  # of the largest logit, in fp32
NUM_CALIBRATION_IMAGES = 8


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, of those that runtimes need."""
    found = {}
    for package in sorted({package for packages in RUNTIMES.values() for package in packages}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Preparation:
    """One network at one batch size, to be run in any runtime.

    Args:
        candidate: The network.
        batch: Images at once.
        folder: Where exported files go, and stay to be used again.
        threads: Threads of each runtime.
    """

    def __init__(self, candidate: Candidate, batch: int, folder: Path, threads: int) -> None:
        self.candidate = candidate
        self.batch = batch
        self.folder = folder
        self.threads = threads
        self.images = torch.randn(batch, 3, candidate.size, candidate.size)
        with torch.inference_mode():
            self.expected: Tensor = candidate.network(self.images)

    def prepare(self, runtime: str, precision: str = "fp32") -> tuple[Run, float]:
        """Return what runs the network once, and how far its output is from PyTorch's, as a share of the largest logit.

        Args:
            runtime: One of `RUNTIMES`.
            precision: One of `PRECISIONS`; "int8" quantises convolutions, in exported files alone.

        Raises:
            ValueError: If the runtime has no such precision, or is not made for the network.
            ModuleNotFoundError: If a package is missing.
            RuntimeError: If it cannot run the network, or gives something else.
        """
        makers = {
            "eager": functools.partial(self._eager, "reference"),
            "kernels": functools.partial(self._eager, "cpu"),
            "compile": self._compiled,
            "onnxruntime": functools.partial(self._onnxruntime, precision),
            "openvino": functools.partial(self._openvino, precision),
        }
        if precision != "fp32" and not RUNTIMES[runtime]:
            raise ValueError(f"{runtime} runs in fp32, not in {precision}")
        if runtime == "kernels" and self.candidate.kind != "ours":
            raise ValueError(f"the compiled kernels are not made for {self.candidate.name}")
        run = makers[runtime]()
        actual = torch.as_tensor(run())
        error = ((actual - self.expected).abs().max() / self.expected.abs().max()).item()
        if precision == "fp32" and not error <= MAX_ERROR:
            raise RuntimeError(f"{self.candidate.name} in {runtime} is off by {error:.1e} of the largest logit")
        return run, error

    def _eager(self, backend: str) -> Run:
        def run() -> Tensor:
            with use_backend(backend), torch.inference_mode():
                return self.candidate.network(self.images)

        return run

    def _compiled(self) -> Run:
        compiled: Any = torch.compile(self.candidate.network, dynamic=False)

        def run() -> Tensor:
            with torch.inference_mode():
                return compiled(self.images)

        return run

    def _onnxruntime(self, precision: str) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # the next case wants the cores
        session = onnxruntime.InferenceSession(self._file(precision), options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: self.images.numpy()}
        return lambda: session.run(None, inputs)[0]

    def _openvino(self, precision: str) -> Run:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        network: Any = openvino.Core().compile_model(self._file(precision), "CPU", settings)
        images = self.images.numpy()
        return lambda: network(images)[0]

    def _file(self, precision: str) -> Path:
        """Return the ONNX file of a precision, which is written when it is first asked for."""
        path = self.folder / f"{self.candidate.name}-{self.batch}-{precision}.onnx"
        if not path.exists():
            make = {"fp32": self._export, "int8": self._quantize}[precision]
            make(path)
        return path

    def _export(self, path: Path) -> None:
        """Export: ours as `model.export` does, others as timm does."""
        if self.candidate.kind == "ours":
            from model.export import export

            size = (self.candidate.size, self.candidate.size)
            export(self.candidate.network, path, size=size, batch=self.batch, images=[self.images[:1].numpy()])
        else:
            from timm.utils.onnx import onnx_export

            onnx_export(self.candidate.network, str(path), example_input=self.images, check=False)

    def _quantize(self, path: Path) -> None:
        """Quantise the convolutions: weights by channel and to 7 bits, which processors without VNNI add up exactly.

        Maps are unsigned, as such processors multiply unsigned with signed numbers.
        """
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source = self._file("fp32")
        prepared = path.with_suffix(".prepared")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        name = _input_of(source)
        shape = tuple(self.images.shape)

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = _made_up(name, shape)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.batches, None)

        quantize_static(
            prepared,
            path,
            Reader(),
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=["Conv"],
            activation_type=QuantType.QUInt8,
        )
        prepared.unlink()


def _input_of(path: Path) -> str:
    import onnx

    return onnx.load(path, load_external_data=False).graph.input[0].name


def _made_up(name: str, shape: tuple[int, ...]) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for _ in range(max(1, NUM_CALIBRATION_IMAGES // shape[0])):
        yield {name: generator.standard_normal(shape, dtype=np.float32)}
