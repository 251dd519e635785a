"""ExecuTorch: a ``.pte`` file for phones and boards, its arithmetic delegated to XNNPACK."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .portable import Form
from .programs import arrays, refuse, trace, write_metadata
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".pte"
EXTRA = "executorch"
PACKAGES = ("executorch",)
FORM = Form()


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form; see `Format`."""
    import executorch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    refuse(request, "executorch", ("dynamic batch", "--dynamic-size", "--fp16", "--int8", "--preprocess"))
    # The compiler of its file format comes with the package, where it does not look for it.
    os.environ.setdefault("FLATC_EXECUTABLE", str(Path(executorch.__path__[0]) / "data" / "bin" / "flatc"))
    program: Any = to_edge_transform_and_lower(
        trace(network, request),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    path.write_bytes(program.to_executorch().buffer)
    write_metadata(request, path)


def load(path: Path) -> Runner:
    """Return what runs the file in ExecuTorch."""
    from executorch.runtime import Runtime

    program: Any = Runtime.get().load_program(str(path))
    method = program.load_method("forward")

    def run(images: np.ndarray) -> list[np.ndarray]:
        return arrays(method.execute([torch.from_numpy(images)]))

    return run
