"""Weights and maps in 8 bits after training: by ONNX Runtime's quantiser for ONNX, by NNCF for OpenVINO.

Convolutions and the head are quantised, each output channel of their weights by a scale of its own. The scan, norms and
what else is between them stays in float, and so does a layer that loses too much by itself.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pictures import find_pictures
from .check import read_images
from .quiet import only_errors
from .request import ExportRequest

if TYPE_CHECKING:
    import onnx

__all__ = [
    "LayerNoise",
    "calibration_images",
    "find_noise",
    "nodes_in_float",
    "quantise_onnx",
    "quantise_openvino",
    "quantise_static",
]

logger = logging.getLogger(__name__)

MAX_CALIBRATION = 256  # images
NUM_FOR_NOISE = 16  # images
MIN_DECIBELS = 15.0
LEVELS = 128  # 7 bits: what processors without VNNI sum up without overflow
HEAD = "network.head"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNoise:
    """What quantising one layer alone does to its output.

    Attributes:
        name: The layer's place in the exported network.
        decibels: Signal to noise, 10 log10 of a ratio of squares.
        is_float: Whether the layer stays in float.
    """

    name: str
    decibels: float
    is_float: bool


def calibration_images(request: ExportRequest) -> list[np.ndarray]:
    """Return images of the folder `ExportRequest.calibration` and below, evenly spread, at most 256 of them.

    Raises:
        FileNotFoundError: If there are none.
    """
    assert request.calibration is not None
    files = find_pictures(request.calibration)
    step = math.ceil(len(files) / MAX_CALIBRATION)
    return read_images(request, files[::step], num_made_up=0)


def find_noise(network: nn.Module, images: Sequence[np.ndarray]) -> list[LayerNoise]:
    """Return how much each convolution, and the head, loses by being the only one that is quantised.

    Args:
        network: In portable form, with what stands before and behind it.
        images: As the network takes them.
    """
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) or (name == HEAD and isinstance(module, nn.Linear))
    }
    step = math.ceil(len(images) / NUM_FOR_NOISE)
    inputs = _inputs(network, layers, images[::step])
    noises = {name: _decibels(module, inputs[name]) for name, module in layers.items()}
    return [
        LayerNoise(name=name, decibels=round(noise, 1), is_float=noise < MIN_DECIBELS) for name, noise in noises.items()
    ]


def _inputs(
    network: nn.Module, layers: Mapping[str, nn.Module], images: Iterable[np.ndarray]
) -> dict[str, list[Tensor]]:
    """Return what each layer is given for each image."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: seen[name].append(arguments[0])

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.inference_mode():
        for image in images:
            network(torch.from_numpy(image))
    for handle in handles:
        handle.remove()
    return seen


def _decibels(layer: Any, inputs: Sequence[Tensor]) -> float:
    weight = layer.weight
    low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
    limit = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1)).clamp_min(1e-12)
    quantised = _rounded(weight, -limit, limit)
    signal, noise = 0.0, 0.0
    with torch.inference_mode():
        for x in inputs:
            expected = layer(x)
            x = _rounded(x, torch.tensor(min(low, 0.0)), torch.tensor(max(high, 0.0) + 1e-12))
            actual = torch.func.functional_call(layer, {"weight": quantised}, (x,))
            signal += float(expected.square().sum())
            noise += float((actual - expected).square().sum())
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))


def _rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = (high - low) / (LEVELS - 1)
    return (x / scale).round() * scale


def nodes_in_float(graph: onnx.GraphProto, noises: Sequence[LayerNoise]) -> list[str]:
    """Return the names of convolutions and products that are not to be quantised."""
    quantised = {f"{noise.name}.weight" for noise in noises if not noise.is_float}
    kinds = ("Conv", "ConvTranspose", "MatMul", "Gemm")
    return [node.name for node in graph.node if node.op_type in kinds and not quantised.intersection(node.input)]


def quantise_onnx(model: onnx.ModelProto, network: nn.Module, request: ExportRequest, path: Path) -> None:
    """Write an ONNX model in 8 bits, layers that lose too much in float.

    Args:
        model: In float.
        network: What it was made of.
        request: What is wanted, with a folder of images.
        path: The file to write.
    """
    import onnx

    images = calibration_images(request)
    noises = _noises(network, images, request)
    quantise_static(
        model,
        path,
        [{request.input_name: _batched(image, request)} for image in images],
        operators=["Conv", "MatMul"],
        in_float=nodes_in_float(model.graph, noises),
    )
    written = onnx.load(path)
    onnx.helper.set_model_props(written, {entry.key: entry.value for entry in model.metadata_props})
    onnx.save(written, path)


def quantise_static(
    model: onnx.ModelProto | Path,
    path: Path,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    operators: Sequence[str],
    in_float: Sequence[str] = (),
) -> None:
    """Write an ONNX model in 8 bits: integers and their scales, as pairs of Quantize and Dequantize.

    Weights are signed, with a scale for each channel; maps are unsigned, as processors without VNNI multiply unsigned
    with signed numbers.

    Args:
        model: In float; or its file.
        path: The file to write.
        batches: Inputs by name, from which the ranges of the maps are learnt.
        operators: The kinds that are quantised.
        in_float: Names of nodes that are not.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with only_errors(logging.getLogger()):  # its warnings advise those who call it
        quantize_static(
            model,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=_may_overflow(),
            op_types_to_quantize=list(operators),
            nodes_to_exclude=list(in_float),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def quantise_openvino(model: Any, graph: onnx.GraphProto, network: nn.Module, request: ExportRequest) -> Any:
    """Return an OpenVINO model in 8 bits.

    Args:
        model: In float.
        graph: The ONNX graph that it was converted from, whose names its operators have.
        network: What that was made of.
        request: What is wanted, with a folder of images.

    Raises:
        ModuleNotFoundError: If NNCF is missing.
    """
    if importlib.util.find_spec("nncf") is None:
        raise ModuleNotFoundError(
            "--int8 for openvino needs nncf: pip install 'mobilemamba[int8]', or pip install nncf"
        )
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    images = calibration_images(request)
    noises = _noises(network, images, request)
    present = {operator.get_friendly_name() for operator in model.get_ops()}
    in_float = [name for name in nodes_in_float(graph, noises) if name in present]
    scope = nncf.IgnoredScope(
        names=in_float,
        types=["Exp", "MVN", "SoftPlus"],
        subgraphs=[nncf.Subgraph(inputs=first, outputs=last) for first, last in _scans(graph)],
        validate=False,
    )
    with only_errors(logging.getLogger("nncf")):
        quantised = nncf.quantize(
            model,
            nncf.Dataset([_batched(image, request) for image in images]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(images),
            ignored_scope=scope,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
            ),
        )
        # NNCF leaves out squeeze-excitation, on whose few numbers 8 bits save no time, but a tenth of the file.
        return nncf.compress_weights(
            quantised,
            mode=nncf.CompressWeightsMode.INT8_SYM,
            ignored_scope=nncf.IgnoredScope(names=in_float, types=["MatMul"], validate=False),
        )


def _scans(graph: onnx.GraphProto) -> list[tuple[list[str], list[str]]]:
    """Return where each scan begins, at its projections, and where it ends, before the norm behind it.

    The norm itself may have another name in OpenVINO.
    """
    scans = []
    for norm in graph.node:
        if norm.op_type == "LayerNormalization":
            place = f"{norm.input[1].rsplit('.', 2)[0]}.scans."
            first = [
                node.name
                for node in graph.node
                if any(name.startswith(place) and name.endswith(".project.weight") for name in node.input)
            ]
            scans.append((first, [norm.input[0]]))
    return scans


def _batched(image: np.ndarray, request: ExportRequest) -> np.ndarray:
    return np.repeat(image, request.batch or 1, axis=0)


def _may_overflow() -> bool:
    """Return whether this processor sums products of 8 bits in 16, which takes 7 bits for sure."""
    return platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_vnni_supported()


def _noises(network: nn.Module, images: Sequence[np.ndarray], request: ExportRequest) -> list[LayerNoise]:
    """Return the noise of each layer, into the report too where one is wanted."""
    noises = find_noise(network, images)
    worst = min(noises, key=lambda noise: noise.decibels)
    num_float = sum(noise.is_float for noise in noises)
    logger.info(
        "calibrated by %d images: %d layers in 8 bits, %d in float; least signal to noise %.1f dB, of %s",
        len(images), len(noises) - num_float, num_float, worst.decibels, worst.name,
    )  # fmt: skip
    if request.int8_report is not None:
        text = json.dumps([asdict(noise) for noise in noises], indent=2)
        request.int8_report.write_text(text + "\n", encoding="utf-8")
    return noises
