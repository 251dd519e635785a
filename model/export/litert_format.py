"""LiteRT, which was TensorFlow Lite: a ``.tflite`` file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .portable import Form
from .programs import refuse, write_metadata
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".tflite"
EXTRA = "litert"
PACKAGES = ("litert_torch", "ai_edge_litert")
FORM = Form()


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form; see `Format`."""
    import litert_torch

    refuse(request, "litert", ("dynamic batch", "--dynamic-size", "--fp16", "--int8", "--preprocess"))
    network = copy.deepcopy(network)
    _flatten_products(network)
    litert_torch.convert(network, (torch.zeros(request.input_shape),)).export(str(path))
    write_metadata(request, path)


class _FlatLinear(nn.Module):
    """A product over the last dimension, as one of matrices: LiteRT has none of maps."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _flatten_products(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _FlatLinear(child))


def load(path: Path) -> Runner:
    """Return what runs the file in LiteRT, by XNNPACK, on as many threads as PyTorch has."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(str(path), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    (images_input,) = interpreter.get_input_details()
    # Their order in the file is not the network's; their names end in their number.
    outputs = sorted(interpreter.get_output_details(), key=lambda output: output["name"])

    def run(images: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(images_input["index"], images)
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"]) for output in outputs]

    return run
