"""What formats share that are made of a `torch.export` program, or cannot do all that is asked."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .request import ExportRequest

__all__ = ["arrays", "refuse", "trace", "write_metadata"]

MAX_BATCH = 1024
_OPTIONS = {
    "dynamic batch": lambda request: request.batch is None,
    "batch above 1": lambda request: request.batch is not None and request.batch > 1,
    "--dynamic-size": lambda request: request.dynamic_size,
    "--fp16": lambda request: request.fp16,
    "--int8": lambda request: request.int8,
    "--preprocess": lambda request: request.preprocess,
}


def refuse(request: ExportRequest, name: str, lacking: Collection[str]) -> None:
    """Raise where a request asks for what a format lacks.

    Args:
        request: What is wanted.
        name: The format.
        lacking: Of the options above.

    Raises:
        ValueError: Naming the first of them.
    """
    for option in lacking:
        if _OPTIONS[option](request):
            raise ValueError(f"{name} files are written without {option}: leave it out, or choose onnx or openvino")


def trace(network: nn.Module, request: ExportRequest) -> ExportedProgram:
    """Return the program of a network in portable form, for one size, and any batch where that is asked for."""
    batch, *shape = request.input_shape
    if request.batch is not None:
        return torch.export.export(network, (torch.zeros(batch, *shape),))
    images = torch.zeros(2, *shape)  # one would be taken for a constant
    return torch.export.export(network, (images,), dynamic_shapes=({0: Dim("batch", max=MAX_BATCH)},))


def arrays(outputs: Tensor | Collection[Tensor]) -> list[Any]:
    """Return a network's output, or outputs, as numpy arrays."""
    return [output.detach().numpy() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs)]


def write_metadata(request: ExportRequest, path: Path) -> None:
    """Write what a file cannot say of itself into a JSON file beside it."""
    text = json.dumps(request.metadata(), indent=2)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
