"""A graph as an ONNX file, and a file as something to run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.files import replacing

from .graph import Graph

__all__ = ["Runner", "load", "write"]

Runner = Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]]  # an image (H, W, 3) -> outputs by name
OPSET = 17
INPUT = "image"


def write(graph: Graph, path: Path, *, size: tuple[int, int], is_dynamic: bool, metadata: Mapping[str, Any]) -> None:
    """Write a graph.

    Args:
        graph: Of a model.
        path: The file.
        size: Height and width of the image, in pixels.
        is_dynamic: Let height and width be any.
        metadata: What the file says of itself; kept as JSON.

    Raises:
        OSError: The file cannot be written.
    """
    import onnx

    image = torch.zeros((1, *size, 3), dtype=torch.uint8)
    axes = _dynamic_axes(graph, is_dynamic=is_dynamic)
    with replacing(path) as aside:
        with torch.no_grad(), warnings.catch_warnings():
            # The older exporter, by tracing, writes numbers of boxes that are known only when it runs.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
            warnings.filterwarnings("ignore", category=UserWarning)
            torch.onnx.export(
                graph,
                (image,),
                str(aside),
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(graph.outputs),
                dynamic_axes=axes,
            )
        model = onnx.load(aside)
        onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
        onnx.save(model, aside)


def _dynamic_axes(graph: Graph, *, is_dynamic: bool) -> dict[str, dict[int, str]]:
    names = {"detections", "height", "width"} if is_dynamic else {"detections"}
    dimensions = {INPUT: ("", "height", "width", ""), **graph.outputs}
    return {
        name: {axis: title for axis, title in enumerate(titles) if title in names}
        for name, titles in dimensions.items()
    }


def load(path: Path) -> Runner:
    """Return what runs a file in ONNX Runtime, on a CPU."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(None, {INPUT: image[None]}), strict=True))

    return run
