"""AOTInductor: a ``.pt2`` package with machine code of this kind of CPU, which PyTorch runs from Python or C++."""

from __future__ import annotations

import shutil
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
    """Compile a network in portable form; see `Format`.

    Raises:
        FileNotFoundError: If there is no C++ compiler.
    """
    refuse(request, "aoti", ("--dynamic-size", "--fp16", "--int8", "--preprocess"))
    if shutil.which("g++") is None:
        raise FileNotFoundError("aoti compiles C++ and there is no g++: install it, or choose torch")
    options = {
        # The code that calls the kernels takes most of the time, and calls them as fast without being optimised.
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.metadata": request.metadata(),
    }
    torch._inductor.aoti_compile_and_package(
        trace(network, request), package_path=str(path.absolute()), inductor_configs=options
    )


def load(path: Path) -> Runner:
    """Return what runs the package's machine code."""
    package = torch._inductor.aoti_load_package(str(path))

    def run(images: np.ndarray) -> list[np.ndarray]:
        return arrays(package(torch.from_numpy(images)))

    return run
