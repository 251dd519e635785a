"""OpenVINO: an ``.xml`` file with the graph, and beside it a ``.bin`` file with the weights."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .portable import Form
from .quiet import log_as_it_was
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".xml"
EXTRA = "openvino"
PACKAGES = ("onnx", "openvino")
FORM = Form(is_flat=True, is_grouped=False)


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form, by way of its ONNX graph; see `Format`."""
    import openvino

    from .int8 import quantise_openvino
    from .onnx_graph import build_model

    whole = replace(request, fp16=False)  # OpenVINO itself keeps weights in 16 bits
    onnx_model = build_model(network, whole, has_fast_softplus=True)
    with log_as_it_was(logging.getLogger()):  # which the converter silences, and leaves so where it fails
        model = openvino.convert_model(io.BytesIO(onnx_model.SerializeToString()))
    _keep_antialias(model, request)
    if request.int8:
        model = quantise_openvino(model, onnx_model.graph, network, request)
    for name, text in request.metadata().items():
        model.set_rt_info(text, ["model_info", name])
    openvino.save_model(model, path, compress_to_fp16=request.fp16)


def _keep_antialias(model: Any, request: ExportRequest) -> None:
    """Resize as Pillow and PyTorch do, where OpenVINO's reading of ONNX leaves the antialiasing out."""
    from openvino import opset11

    for node in model.get_ops():
        if node.get_type_name() == "Interpolate":
            resized = opset11.interpolate(
                node.input_value(0),
                np.array(request.size),
                f"{request.interpolation}_pillow",
                "sizes",
                cube_coeff=-0.5,
                axes=np.array([2, 3]),
            )
            node.output(0).replace(resized.output(0))


def load(path: Path) -> Runner:
    """Return what runs the file in OpenVINO, on a CPU."""
    import openvino

    core = openvino.Core()
    compiled: Any = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = compiled(images)
        return [outputs[index] for index in range(len(outputs))]

    return run
