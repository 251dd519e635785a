"""Core ML: an ``.mlpackage`` folder, converted anywhere and run on Apple's machines."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from .portable import Form
from .programs import refuse, trace
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".mlpackage"
EXTRA = "coreml"
PACKAGES = ("coremltools",)
FORM = Form(is_joined=False)


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form as an ML program for iOS 17 and macOS 14 on; see `Format`.

    Raises:
        ValueError: If the request asks for what Core ML files are written without, or numpy is too new for coremltools.
    """
    import coremltools

    refuse(request, "coreml", ("dynamic batch", "--dynamic-size", "--int8", "--preprocess"))
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise ValueError(f"coremltools 9 fails with numpy {np.__version__}: pip install 'numpy<2.4'")
    program = without_aliases(trace(network, request).run_decompositions({}))
    precision = coremltools.precision.FLOAT16 if request.fp16 else coremltools.precision.FLOAT32
    model = coremltools.convert(
        program,
        inputs=[coremltools.TensorType(name=request.input_name, shape=request.input_shape)],
        outputs=[coremltools.TensorType(name=name) for name in request.output_names],
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=precision,
    )
    model.user_defined_metadata.update(request.metadata())
    model.save(str(path))


def without_aliases(program: ExportedProgram) -> ExportedProgram:
    """Return the program without its ``alias`` nodes, which coremltools 9 does not know."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def load(path: Path) -> Runner | None:
    """Return what runs the file in Core ML; None but on macOS, where Core ML is."""
    if platform.system() != "Darwin":
        return None
    import coremltools

    model: Any = coremltools.models.MLModel(str(path))
    names = [output.name for output in model.get_spec().description.output]
    (name,) = (each.name for each in model.get_spec().description.input)

    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = model.predict({name: images})
        return [outputs[each] for each in names]

    return run
