"""ncnn: a ``.param`` file with the graph, and beside it a ``.bin`` file with the weights; one image at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .portable import Form
from .programs import refuse, write_metadata
from .request import ExportRequest, Runner

__all__ = ["EXTRA", "FORM", "PACKAGES", "SUFFIX", "load", "write"]

SUFFIX = ".param"
EXTRA = "ncnn"
PACKAGES = ("ncnn", "pnnx")
FORM = Form(is_joined=False)


def write(network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write a network in portable form, by way of TorchScript and pnnx; see `Format`.

    Raises:
        RuntimeError: If pnnx wrote no file.
    """
    import pnnx

    refuse(request, "ncnn", ("dynamic batch", "batch above 1", "--dynamic-size", "--int8", "--preprocess"))
    images = torch.zeros(request.input_shape)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "network.pt"
        torch.jit.trace(network, images).save(str(script))
        pnnx.convert(str(script), (images,), fp16=request.fp16)
        for suffix in (".param", ".bin"):
            written = script.with_suffix(f".ncnn{suffix}")
            if not written.is_file():
                raise RuntimeError(f"pnnx wrote no {written.name} for {path}: see its own messages above")
            path.with_suffix(suffix).write_bytes(written.read_bytes())
    write_metadata(request, path)


def load(path: Path) -> Runner:
    """Return what runs the file in ncnn, in float32, on one thread for each core."""
    import ncnn

    net: Any = ncnn.Net()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    net.opt.num_threads = torch.get_num_threads()
    for read, file in ((net.load_param, path), (net.load_model, path.with_suffix(".bin"))):
        if read(str(file)):
            raise ValueError(f"ncnn cannot read {file}: see its own messages above")

    # Sums that nothing reads are outputs too; pnnx numbers the network's own.
    names = sorted(name for name in net.output_names() if name.startswith("out"))

    def run(images: np.ndarray) -> list[np.ndarray]:
        results = []
        with net.create_extractor() as extractor:
            (image,) = images
            extractor.input("in0", ncnn.Mat(np.ascontiguousarray(image)))
            for name in names:
                code, output = extractor.extract(name)
                if code:
                    raise RuntimeError(f"ncnn stopped with code {code} at {name} of {path}")
                results.append(np.array(output)[None])
        return results

    return run
