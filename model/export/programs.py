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

__all__ = ["METADATA_SUFFIX", "arrays", "refuse", "trace", "write_metadata"]

METADATA_SUFFIX = ".json"  # beside files that have no room for it
MAX_BATCH = 1024
MIN_DYNAMIC_SIZE = 65  # `torch.export` takes a map of one pixel, which smaller images end as, for a constant
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
    """Return the program of a network in portable form, for any batch and any size where they are asked for.

    Raises:
        ValueError: If any size is asked for, and the one that is checked is below the smallest.
    """
    if request.dynamic_size and min(request.size) < MIN_DYNAMIC_SIZE:
        raise ValueError(
            f"a program for any size takes {MIN_DYNAMIC_SIZE} pixels or more, and is checked at "
            f"{request.size[0]}x{request.size[1]}: choose a larger --size, or leave --dynamic-size out"
        )
    batch, channels, *size = request.input_shape
    if request.batch is None:
        batch = 2  # one would be taken for a constant
    dims: dict[int, Any] = {0: Dim("batch", max=MAX_BATCH)} if request.batch is None else {}
    if request.dynamic_size:
        size = list(request.largest)
        for place, side, largest in zip((2, 3), ("height", "width"), size, strict=True):
            dims[place] = Dim(side, min=MIN_DYNAMIC_SIZE, max=largest)
    # The crops of odd maps compare sizes in ways that a program cannot promise for all of them, but can check.
    return torch.export.export(
        network,
        (torch.zeros(batch, channels, *size),),
        dynamic_shapes=(dims,) if dims else None,
        prefer_deferred_runtime_asserts_over_guards=request.dynamic_size,
    )


def arrays(outputs: Tensor | Collection[Tensor]) -> list[Any]:
    """Return a network's output, or outputs, as numpy arrays."""
    return [output.detach().numpy() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs)]


def write_metadata(request: ExportRequest, path: Path) -> None:
    """Write what a file cannot say of itself into a JSON file beside it."""
    text = json.dumps(request.metadata(), indent=2)
    path.with_suffix(METADATA_SUFFIX).write_text(text + "\n", encoding="utf-8")
