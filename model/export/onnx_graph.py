"""A network in portable form as an ONNX graph, node by node.

`torch.fx` lists the operations, of which a portable network has few kinds; each becomes the ONNX operator that
runtimes know best. Nothing depends on a size, so that a graph takes any, and no optimiser has to clean it up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from .deployed import TIE, center_crop
from .portable import crop_like
from .request import ExportRequest
from .scan import any_recurrence, flip_sequence, pad_row

__all__ = ["build_model"]

OPSET = 18  # the first with antialiased Resize
IR_VERSION = 10
HALVED_SIZE = 1024  # weights of fewer numbers stay in 32 bits: the scan's rates, norms, biases
_FLOAT, _UINT8 = TensorProto.FLOAT, TensorProto.UINT8
_FIRST = np.iinfo(np.int64).min


def build_model(network: nn.Module, request: ExportRequest, *, has_fast_softplus: bool = False) -> onnx.ModelProto:
    """Return the ONNX model of a network in portable form, with its metadata.

    Args:
        network: With what stands before and behind it; in float32.
        request: What is wanted.
        has_fast_softplus: Whether the runtime computes softplus as fast as it does exp.
    """
    traced = fx.GraphModule(network, fx.Tracer().trace(network)).graph
    traced.eliminate_dead_code()
    graph = _Graph(network, request, has_fast_softplus=has_fast_softplus)
    outputs = graph.add_all(traced)
    names = request.output_names
    for name, output in zip(names, outputs, strict=True):
        graph.add("Identity", [output], name=name)
    shape, kind = _input_type(request)
    inputs = [helper.make_tensor_value_info(request.input_name, kind, shape)]
    values = [helper.make_tensor_value_info(name, _FLOAT, None) for name in names]
    proto = helper.make_graph(graph.nodes, "MobileMamba", inputs, values, list(graph.constants.values()))
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    facts = request.metadata()
    model.producer_name, _, model.producer_version = facts.pop("producer").partition(" ")
    helper.set_model_props(model, facts)
    return onnx.shape_inference.infer_shapes(model)


def _input_type(request: ExportRequest) -> tuple[list[int | str], int]:
    """Return the input's shape, with names for what is free, and its type."""
    batch = "batch" if request.batch is None else request.batch
    if request.preprocess:
        return [batch, "height", "width", request.num_channels], _UINT8
    sides = ["height", "width"] if request.dynamic_size else list(request.size)
    return [batch, request.num_channels, *sides], _FLOAT


class _Graph:
    """Nodes and constants of a graph, made from a traced network's operations."""

    def __init__(self, network: nn.Module, request: ExportRequest, *, has_fast_softplus: bool) -> None:
        self.network = network
        self.input_name = request.input_name
        self.fp16 = request.fp16
        self.has_fast_softplus = has_fast_softplus
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.names: dict[fx.Node, Any] = {}  # what each operation became: a name, or several

    def add(self, op: str, inputs: Sequence[str], *, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return the name of that."""
        name = name or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Return the name of a small constant; equal ones are one."""
        array = np.asarray(value, dtype)
        name = f"constant_{array.dtype}_{array.shape}_{array.tolist()}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, *, is_transposed: bool = False) -> str:
        """Return the name of a parameter or buffer as it is to be read: kept in 16 bits where that is wanted."""
        tensor: Tensor = operator.attrgetter(name)(self.network)
        array = (tensor.t() if is_transposed else tensor).detach().contiguous().numpy()
        is_halved = self.fp16 and array.size >= HALVED_SIZE
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(_halved(array) if is_halved else array, name)
        return self.add("Cast", [name], to=_FLOAT) if is_halved else name

    def add_all(self, traced: fx.Graph) -> list[str]:
        """Add every operation in order; return the names of the outputs."""
        for node in traced.nodes:
            if node.op == "placeholder":
                self.names[node] = self.input_name
            elif node.op == "get_attr":
                self.names[node] = self.weight(node.target)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], lambda argument: self.names[argument])
                return list(outputs) if isinstance(outputs, tuple | list) else [outputs]
            elif node.op == "call_module":
                module = self.network.get_submodule(node.target)
                self.names[node] = _MODULES[type(module)](self, node.target, module, self.names[node.args[0]])
            else:
                self.names[node] = _FUNCTIONS[node.target](self, *self._values(node.args), **self._values(node.kwargs))
        raise AssertionError("a traced graph ends with its output")

    def _values(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, lambda argument: self.names[argument])

    def operand(self, value: Any) -> str:
        """Return the name of an operand, which may be a number."""
        return value if isinstance(value, str) else self.constant(value, np.float32)


def _halved(array: np.ndarray) -> np.ndarray:
    """Return numbers in 16 bits, the largest of these in place of what exceeds them."""
    limit = np.finfo(np.float16).max
    return array.clip(-limit, limit).astype(np.float16)


def _parameters(graph: _Graph, name: str, module: nn.Module) -> list[str]:
    return [graph.weight(f"{name}.{own}") for own in ("weight", "bias") if getattr(module, own) is not None]


def _conv(graph: _Graph, name: str, conv: Any, x: str) -> str:
    sizes = {
        "kernel_shape": conv.kernel_size,
        "strides": conv.stride,
        "pads": [*conv.padding, *conv.padding],
        "group": conv.groups,
    }
    op = "ConvTranspose" if isinstance(conv, nn.ConvTranspose2d) else "Conv"
    return graph.add(op, [x, *_parameters(graph, name, conv)], **sizes)


def _linear(graph: _Graph, name: str, linear: Any, x: str) -> str:
    y = graph.add("MatMul", [x, graph.weight(f"{name}.weight", is_transposed=True)])
    return y if linear.bias is None else graph.add("Add", [y, graph.weight(f"{name}.bias")])


def _layer_norm(graph: _Graph, name: str, norm: Any, x: str) -> str:
    return graph.add("LayerNormalization", [x, *_parameters(graph, name, norm)], axis=-1, epsilon=norm.eps)


def _silu(graph: _Graph, x: str, **_: Any) -> str:
    return graph.add("Mul", [x, graph.add("Sigmoid", [x])])


_MODULES: dict[type[nn.Module], Callable[..., str]] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: lambda graph, name, module, x: graph.add("Relu", [x]),
    nn.SiLU: lambda graph, name, module, x: _silu(graph, x),
    nn.Identity: lambda graph, name, module, x: x,
}


def _unary(op: str) -> Callable[..., str]:
    return lambda graph, x, **_: graph.add(op, [x])


def _binary(op: str) -> Callable[..., str]:
    return lambda graph, x, y: graph.add(op, [graph.operand(x), graph.operand(y)])


def _softplus(graph: _Graph, x: str, **_: Any) -> str:
    """Add max(x, 0) - log(sigmoid(|x|)), as ONNX Runtime computes many of these at once, but softplus one by one."""
    if graph.has_fast_softplus:
        return graph.add("Softplus", [x])
    rest = graph.add("Log", [graph.add("Sigmoid", [graph.add("Abs", [x])])])
    return graph.add("Sub", [graph.add("Relu", [x]), rest])


def _reduce(op: str) -> Callable[..., str]:
    def add(graph: _Graph, x: str, dims: Sequence[int], *, keepdim: bool = False) -> str:
        return graph.add(op, [x, graph.constant(list(dims))], keepdims=int(keepdim))

    return add


def _concatenate(graph: _Graph, maps: Sequence[str], dim: int) -> str:
    return maps[0] if len(maps) == 1 else graph.add("Concat", list(maps), axis=dim)


def _split(graph: _Graph, x: str, sizes: Sequence[int], dim: int) -> list[str]:
    if len(sizes) == 1:
        return [x]
    names = [f"split_{len(graph.nodes)}_{index}" for index in range(len(sizes))]
    graph.nodes.append(helper.make_node("Split", [x, graph.constant(list(sizes))], names, name=names[0], axis=dim))
    return names


def _slice(graph: _Graph, x: str, start: str, end: str, axes: Sequence[int], *steps: int) -> str:
    inputs = [x, start, end, graph.constant(list(axes))]
    return graph.add("Slice", [*inputs, graph.constant(steps)] if steps else inputs)


def _flip(graph: _Graph, x: str, *dims: int) -> str:
    back = [-1] * len(dims)
    return _slice(graph, x, graph.constant(back), graph.constant([_FIRST] * len(dims)), dims, *back)


def _pad_row(graph: _Graph, x: str, *, is_reverse: bool = False) -> str:
    pads = graph.constant([0, 1] if is_reverse else [1, 0])
    return graph.add("Pad", [x, pads, graph.constant(0, np.float32), graph.constant([1])])


def _any_recurrence(graph: _Graph, decay: str, inputs: str, *, is_reverse: bool = False) -> str:
    """Loop over the columns of all rows, then over the rows' ends: a loop ends with the map, whatever its size."""
    shape = graph.add("Shape", [decay])
    state, row_decays, states, decays = _loop(graph, decay, inputs, shape, 2, is_reverse=is_reverse)
    row_shape = graph.add("Shape", [row_decays])
    before = _loop(graph, row_decays, state, row_shape, 1, is_reverse=is_reverse, gives_states_before=True)[2]
    before = graph.add("Unsqueeze", [before, graph.constant([2])])
    return graph.add("Add", [states, graph.add("Mul", [decays, before])])


def _loop(
    graph: _Graph,
    decay: str,
    inputs: str,
    shape: str,
    axis: int,
    *,
    is_reverse: bool,
    gives_states_before: bool = False,
) -> list[str]:
    """Add a loop along an axis; return the last state and product of decays, and those at every position."""
    kept = [dim for dim in range(4 if axis == 2 else 3) if dim != axis]
    sides = graph.add("Gather", [shape, graph.constant(kept)])
    start = graph.add("ConstantOfShape", [sides])
    one = graph.add("ConstantOfShape", [sides], value=numpy_helper.from_array(np.ones(1, np.float32)))
    outputs = [f"loop_{len(graph.nodes)}_{index}" for index in range(4)]
    way = [int(is_reverse)] * 2
    node = helper.make_node(
        "Scan",
        [start, one, decay, inputs],
        outputs,
        name=outputs[0],
        body=_loop_body(gives_states_before),
        num_scan_inputs=2,
        scan_input_axes=[axis] * 2,
        scan_output_axes=[axis] * 2,
        scan_input_directions=way,
        scan_output_directions=way,
    )
    graph.nodes.append(node)
    return outputs


def _loop_body(gives_states_before: bool) -> onnx.GraphProto:
    """Return a step of ``state = decay * state + input``, with the product of decays."""
    nodes = [
        helper.make_node("Mul", ["decay", "state"], ["kept"]),
        helper.make_node("Add", ["kept", "input"], ["next_state"]),
        helper.make_node("Mul", ["decay", "product"], ["next_product"]),
        helper.make_node("Identity", ["state" if gives_states_before else "next_state"], ["state_here"]),
        helper.make_node("Identity", ["next_product"], ["product_here"]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, _FLOAT, None) for name in names]
        for names in (
            ("state", "product", "decay", "input"),
            ("next_state", "next_product", "state_here", "product_here"),
        )
    )
    return helper.make_graph(nodes, "step", inputs, outputs)


def _flip_sequence(graph: _Graph, x: str, length: int) -> str:
    return graph.add("Gather", [x, graph.constant(range(length)[::-1])], axis=1)


def _crop_like(graph: _Graph, x: str, like: str) -> str:
    return _slice(graph, x, graph.constant([0, 0]), graph.add("Shape", [like], start=2), [2, 3])


def _item(graph: _Graph, values: Sequence[str], index: int) -> str:
    return values[index]


def _center_crop(graph: _Graph, x: str, size: tuple[int, int], crop_pct: float) -> str:
    sides = graph.add("Cast", [graph.add("Shape", [x], start=2)], to=_FLOAT)
    wanted = graph.constant(size, np.float32)
    scale = graph.add("ReduceMin", [graph.add("Div", [sides, wanted])], keepdims=1)
    kept = graph.add("Mul", [wanted, graph.add("Mul", [scale, graph.constant(crop_pct, np.float32)])])
    kept = graph.add("Round", [graph.add("Add", [kept, graph.constant(TIE, np.float32)])])
    kept = graph.add("Max", [kept, graph.constant(1, np.float32)])
    half = graph.add("Mul", [graph.add("Sub", [sides, kept]), graph.constant(0.5, np.float32)])
    start = graph.add("Floor", [half])
    end = graph.add("Add", [start, kept])
    first, last = (graph.add("Cast", [bound], to=TensorProto.INT64) for bound in (start, end))
    return _slice(graph, x, first, last, [2, 3])


def _interpolate(graph: _Graph, x: str, size: Sequence[int], *, mode: str, antialias: bool, **_: Any) -> str:
    modes = {"bilinear": "linear", "bicubic": "cubic"}
    inputs = [x, "", "", graph.constant(list(size))]
    filters: dict[str, Any] = {
        "cubic_coeff_a": -0.5,
        "exclude_outside": 1,
        "antialias": int(antialias),
    }  # as PyTorch has them
    return graph.add("Resize", inputs, mode=modes[mode], axes=[2, 3], **filters)


def _to(graph: _Graph, x: str, dtype: torch.dtype) -> str:
    assert dtype == torch.float32
    return graph.add("Cast", [x], to=_FLOAT)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _binary("Add"),
    operator.mul: _binary("Mul"),
    operator.getitem: _item,
    torch.exp: _unary("Exp"),
    torch.matmul: _binary("MatMul"),
    torch.cat: _concatenate,
    F.relu: _unary("Relu"),
    F.silu: _silu,
    F.softplus: _softplus,
    F.interpolate: _interpolate,
    any_recurrence: _any_recurrence,
    pad_row: _pad_row,
    crop_like: _crop_like,
    flip_sequence: _flip_sequence,
    center_crop: _center_crop,
    "amax": _reduce("ReduceMax"),
    "flip": _flip,
    "mean": _reduce("ReduceMean"),
    "permute": lambda graph, x, *dims: graph.add("Transpose", [x], perm=dims),
    "reshape": lambda graph, x, *sizes: graph.add("Reshape", [x, graph.constant(sizes)]),
    "sigmoid": _unary("Sigmoid"),
    "softmax": lambda graph, x, dim, **_: graph.add("Softmax", [x], axis=dim),
    "split": _split,
    "to": _to,
    "transpose": lambda graph, x, *dims: graph.add("Transpose", [x], perm=_swapped(*dims)),
}


def _swapped(first: int, second: int) -> list[int]:
    dims = [0, 1, 2, 3]
    dims[first], dims[second] = second, first
    return dims
