"""ONNX, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .portable import Form
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".onnx"
EXTRA = "onnx"
PACKAGES = ("onnx", "onnxruntime")
FORM = Form(is_grouped=False)


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form; see `Format`."""
    import onnx

    from .int8 import quantise_onnx
    from .onnx_graph import build_model

    model = build_model(network, request)
    if request.int8:
        quantise_onnx(model, network, request, path)
    else:
        onnx.save(model, path)


def load(path: Path) -> Runner:
    """Return what runs the file in ONNX Runtime, on a CPU."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (images_input,) = session.get_inputs()

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {images_input.name: images})

    return run
