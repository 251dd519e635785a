"""Times of the scan alone beside the memory's rate, and the Triton kernels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.lib_mamba import backends, gated_scan, use_backend

from .. import scan
from .checks import compare_scan, production_calls
from .context import Cases, Context
from .scale import T2

__all__ = ["core", "other_batches", "triton", "triton_calls"]

# Tensors of (B, L, D) that any implementation must move. Forward reads x and z and writes y; backward reads x, z and
# the gradient of y and writes those of x and z. In training, forward may save more, which counts as its own fault.
TENSORS = {"forward": 3, "training forward": 3, "backward": 5}
AIMS = {"forward": 2.0, "backward": 3.0}  # times the floor, on one H200 with the "cuda" backend
PRECISION, SMALL_PRECISION = "bf16", "fp32"
MAX_SETS = 16


def core(context: Context) -> Cases:
    """Time every production call at the full batch, forward and backward, as CUDA graphs."""
    calls = production_calls([*context.scale.networks, *context.scale.more_networks])
    for call, direction in itertools.product(calls, TENSORS):
        yield (
            _case(call, context.scale.batch, direction),
            functools.partial(_time_call, context, call, context.scale.batch, direction),
        )


def other_batches(context: Context) -> Cases:
    """Time the same with fewer images, where a GPU is harder to fill."""
    calls = production_calls(context.scale.few_networks)
    for batch, call, direction in itertools.product(context.scale.other_batches, calls, TENSORS):
        yield _case(call, batch, direction), functools.partial(_time_call, context, call, batch, direction)


def _case(call: scan.Call, batch: int, direction: str) -> dict[str, Any]:
    return {"D": call.channels, "L": call.length, "R": call.rank, "batch": batch, "pass": direction}


def _time_call(context: Context, call: scan.Call, batch: int, direction: str) -> dict[str, Any]:
    """Time one pass beside a contiguous copy of as many bytes.

    The floor is what any implementation must move, over the rate of a large copy; ``copy_s`` is the time that a copy
    of this very size takes, which for small calls is mostly its launch.
    """
    precision = PRECISION if context.is_cuda else SMALL_PRECISION  # a CPU may have no arithmetic for it
    rate = context.copy_rate
    sets = _input_sets(context, call, batch, precision)
    moved = TENSORS[direction] * sets[0][0].numel() * sets[0][0].element_size()
    with context.stream() as stream:
        calls = [_pass(direction, tensors) for tensors in sets]
        copies = [_copy(moved, context.device) for _ in sets]
    runs = {name: context.captured(_all(own), stream) for name, own in (("scan", calls), ("copy", copies))}
    measured = context.time(runs, context.scale.short_plan)
    seconds, copy = (measured.seconds[name] / len(sets) for name in ("scan", "copy"))
    floor = moved / rate
    name = backends.choose(context.device).name
    aim = AIMS.get(direction) if name == "cuda" else None
    return {
        "backend": name,
        "precision": precision,
        "seconds": seconds,
        "floor_s": floor,
        "copy_s": copy,
        "times_floor": seconds / floor,
        "bytes_per_s": moved / seconds,
        "sets": len(sets),
        "gauges": measured.gauges,
        "aim": aim,
    }


def _input_sets(context: Context, call: scan.Call, batch: int, precision: str) -> list[list[Tensor]]:
    """Return inputs of a call, several times over, so that no run finds its own in the GPU's cache."""
    tensors = scan.core_arguments(call, batch, scan.DTYPES[precision], context.device)
    if not context.is_cuda:
        return [tensors]
    x, z, *others = tensors
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    number = min(MAX_SETS, 1 + math.ceil(2 * cache / (3 * x.numel() * x.element_size())))
    # z stays part of a wider tensor.
    return [[x.clone(), torch.cat([z, z], -1)[..., call.channels :], *others] for _ in range(number)]


def _pass(direction: str, tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """Return what runs one pass over one set of inputs."""
    if direction == "forward":

        def forward() -> Any:
            with torch.inference_mode():
                return gated_scan(*tensors)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if direction == "training forward":
        return lambda: gated_scan(*leaves)
    y = gated_scan(*leaves)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def _copy(moved: int, device: str) -> Callable[[], Any]:
    """Return what reads and writes so many bytes together."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def _all(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def triton_calls(context: Context) -> list[scan.Call]:
    """Return a call of a variant at each of the lengths that Triton's kernels are looked at."""
    calls = {call.length: call for call in reversed(production_calls([T2, *context.scale.networks]))}
    return [calls[length] for length in context.scale.triton_lengths if length in calls]


def triton(context: Context) -> Cases:
    """Check and time the Triton kernels at few shapes; elsewhere than on a GPU the reference stands in for them."""
    name = "triton" if context.is_cuda else backends.REFERENCE
    batch = context.scale.batch
    for call in triton_calls(context):
        yield (
            _case(call, batch, "check"),
            functools.partial(_on, name, compare_scan, call, batch, scan.DTYPES[PRECISION], context.device),
        )
        for direction in TENSORS:
            yield (
                _case(call, batch, direction),
                functools.partial(_on, name, _time_call, context, call, batch, direction),
            )


def _on(name: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with use_backend(name):
        return function(*arguments)
