"""Counts what a GPU would be asked to launch, by tracing with fake CUDA tensors: no GPU is needed.

What counts, for every call that reaches ATen:

- a view, and memory that is only set aside, nothing;
- a convolution 1, 1 more for its bias, which ATen adds afterwards, and 1 for each of its input and its weight that does
  not lie channels-last, as cuDNN is given a copy then;
- a product 1, with the bias and the ReLU that belong to it;
- padding 2, as ATen fills and then copies;
- a scan 1, and 1 for each parameter that its kernels would have to cast or copy first, and for each sequence whose
  channels do not lie side by side;
- anything else 1: every element-wise operation, reduction, cast and copy, and each operation on a list of tensors.

What torch.compile would launch is counted in the code that it writes: its own kernels, and calls of others.

Everything is in float16: without a GPU, PyTorch believes that cuDNN has no convolutions in bfloat16.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["compiled_launches", "eager_launches", "fake_gpu", "images"]

_FREE = {"_reshape_alias", "_unsafe_view", "alias", "detach", "lift_fresh", "split", "split_with_sizes", "unbind"}
_FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class LaunchCounter(TorchDispatchMode):
    """While entered, counts launches: ``counts`` by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "mobilemamba":
            self._count_scan(args)
        elif name == "convolution":
            self._count_convolution(*args)
        elif name == "constant_pad_nd":
            self.counts["padding"] += 2
        elif func.namespace == "aten" and name not in _FREE and not func.is_view:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def _count_scan(self, args: Any) -> None:
        x, z, projection, *parameters = (arg for arg in args if isinstance(arg, Tensor))
        is_read = [parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in parameters]
        self.counts["scan"] += 1
        self.counts["scan: copy of a sequence"] += sum(tensor.stride(-1) != 1 for tensor in (x, z, projection))
        self.counts["scan: cast or copy of a parameter"] += is_read.count(False)

    def _count_convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> None:
        *_, is_transposed, _, groups = options
        kind = "transposed convolution" if is_transposed else "convolution"
        is_depthwise = groups > 1 and weight.shape[:2] == (groups, 1)
        self.counts[kind if groups == 1 or is_depthwise else f"grouped {kind}"] += 1
        self.counts["convolution: bias"] += bias is not None
        for name, tensor in (("input", x), ("weight", weight)):
            is_copied = not tensor.is_contiguous(memory_format=torch.channels_last)
            self.counts[f"convolution: copy of the {name}"] += is_copied


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Let tensors on ``cuda`` be fake ones, and autocast work there."""
    with pytest.MonkeyPatch.context() as patch, fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        yield


def images(batch: int, size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return images (B, 3, size, size), channels-last, within `fake_gpu`."""
    shape = (batch, 3, size, size)
    return torch.empty(shape, dtype=dtype, device="cuda", memory_format=torch.channels_last)


def eager_launches(network: nn.Module, x: Tensor) -> Counter[str]:
    """Return the launches of a forward pass, by operator."""
    with LaunchCounter() as counter:
        network(x)
    return +counter.counts


def compiled_launches(network: nn.Module, x: Tensor) -> Counter[str]:
    """Return the launches of a forward pass without gradients that torch.compile writes, within `fake_gpu`."""
    from torch._inductor import compile_fx, config, decomposition
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, state, (x,))

    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    with torch.no_grad(), _inductor_without_gpu() as written:
        graph = make_fx(call, decomposition_table=decomposition.select_decomp_table())(state, x)
        inputs = torch.utils._pytree.tree_leaves((state, x))
        context = torch._guards.TracingContext(torch._guards.detect_fake_mode(inputs))
        with torch._guards.tracing(context), config.patch(fx_graph_cache=False, compile_threads=1, shape_padding=False):
            joint_graph_passes(graph)
            with contextlib.suppress(_Written):
                compile_fx.compile_fx_inner(graph, inputs)
    return _calls(written[0])


class _Written(BaseException):
    """The code is written; it cannot be loaded here."""


@contextlib.contextmanager
def _inductor_without_gpu() -> Iterator[list[str]]:
    """Let inductor write code for a GPU that is not there, instead of loading it; yield the list for it."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.graph import GraphLowering
    from torch.utils import _triton

    written: list[str] = []
    h100 = SimpleNamespace(
        name="NVIDIA H100",
        major=9,
        minor=0,
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20,
    )

    def keep(graph: Any) -> None:
        code, _ = graph.codegen()
        written.append(code.value)
        raise _Written

    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": h100,
        "get_device_capability": (9, 0),
        "is_current_stream_capturing": False,
        "synchronize": None,
        "get_rng_state": torch.ByteTensor(),
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(f"torch.cuda.{name}", lambda *_, answer=answer, **__: answer)
        for owner in (CudaInterface, CudaInterface.Worker):
            patch.setattr(owner, "get_device_properties", staticmethod(lambda *_: h100))
        patch.setattr(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90))
        patch.setattr(CudaInterface, "synchronize", staticmethod(lambda *_: None))
        patch.setattr(fake_tensor.FakeTensorMode, "avoid_device_init", True)
        patch.setattr(fake_tensor, "init_gpu_context", lambda _: None)
        patch.setattr("torch._inductor.codegen.triton.triton_hash_with_backend", lambda: "", raising=False)
        patch.setattr("torch.utils._triton.triton_hash_with_backend", lambda: "")
        patch.setattr(GraphLowering, "compile_to_module", keep)
        patch.setattr(GraphLowering, "_compile_to_module", keep)
        _triton.has_triton.cache_clear()  # what it said without a GPU, and afterwards with one
        yield written
    _triton.has_triton.cache_clear()


def _calls(code: str) -> Counter[str]:
    """Count the calls in the code of a graph, and the inputs of convolutions that cuDNN would be given a copy of."""
    body = code[code.index("def call(") :]
    counts = Counter(re.findall(r"(triton)_\w+\.run\(", body))
    counts.update(re.findall(r"extern_kernels\.(\w+)\(", body))
    counts.update(re.findall(r"= torch\.ops\.(\w+\.\w+)\.\w+\(", body))
    return counts
