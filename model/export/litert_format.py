"""LiteRT, which was TensorFlow Lite: a ``.tflite`` file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
    _products_as_convolutions(network)
    litert_torch.convert(network, (torch.zeros(request.input_shape),)).export(str(path))
    write_metadata(request, path)


class _Pointwise(nn.Module):
    """A product over the channels of a map (B, H, W, C) as a convolution: LiteRT has products of matrices alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return self.linear(x)
        y = F.conv2d(x.permute(0, 3, 1, 2), self.linear.weight[..., None, None], self.linear.bias)
        return y.permute(0, 2, 3, 1)


def _products_as_convolutions(network: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _Pointwise(child))


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
