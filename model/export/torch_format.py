"""A `torch.export` program: a ``.pt2`` file, which PyTorch runs, compiles and converts without this package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .portable import Form
from .programs import arrays, refuse, trace
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".pt2"
EXTRA = ""
PACKAGES = ("torch",)
FORM = Form()


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form; see `Format`. What it says of itself is its extra file ``metadata.json``."""
    refuse(request, "torch", ("--dynamic-size", "--fp16", "--int8", "--preprocess"))
    facts = {"metadata.json": json.dumps(request.metadata())}
    torch.export.save(trace(network, request), path, extra_files=facts)


def load(path: Path) -> Runner:
    """Return what runs the program in PyTorch."""
    program = torch.export.load(path).module()

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return arrays(program(torch.from_numpy(images)))

    return run
